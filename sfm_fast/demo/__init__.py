"""The demo: the whole road on embedded data, what it cost, and the page that shows it."""
