"""Reports of benchmark results: tables, CSV, figures, where we lose, and the page of `sfm-fast bench`."""
