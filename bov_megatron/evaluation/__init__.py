"""Evaluation of exported models: lm-eval's tasks, and bits per byte."""
