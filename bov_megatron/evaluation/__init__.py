"""Evaluation of exported models: lm-eval tasks and bits per byte."""
