"""Who takes part: hsrjax's calls, dense baselines and other people's libraries."""
