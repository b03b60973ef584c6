"""What each command does; imported when it is run, because this loads torch."""
