"""Private: names here change without notice. What is public is in `hsrjax`."""
