"""Scaling studies: one file -> runs -> table of results -> fits with intervals -> page. Without torch."""
