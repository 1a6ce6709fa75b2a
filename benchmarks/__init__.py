"""hsrjax measured against dense attention and against other people's libraries.

Folders, each of which uses those after it alone: `commands` and `paper` say what is
measured, `contestants` who takes part, `harness` how it is measured and `files` how it
is kept. `header` is what all commands share.
"""
