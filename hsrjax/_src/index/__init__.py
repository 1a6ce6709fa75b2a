"""Keys ready for half-space reporting, and certified bounds on their scores."""
