"""Reports of benchmark results: tables and CSV, where we lose, figures, and the page of `sfm-fast bench`."""
