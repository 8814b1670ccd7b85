"""The page of a study: numbers, figures, one HTML file."""
