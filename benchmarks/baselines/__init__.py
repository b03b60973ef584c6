"""The code that the package is measured against, written as a user would write it today."""
