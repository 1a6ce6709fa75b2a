"""Measurements of hsrjax against dense attention and its peers; see README.md."""
