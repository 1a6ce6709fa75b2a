"""Private: names here change without notice. What is public is in `hsrjax`.

Words for groups, the same everywhere:

  slot   room for one key; P of them, filled in the order in which keys come
  block  32 slots, one word of a bit set; they share a scale of the sketch
  cell   blocks whose keys are near each other, 128 slots; a bound is on a cell
  set    of slots, as bits: the keys that some queries look at
  tile   query positions, with all heads of a key head, bounded together: Q rows
  part   rows of a tile that gather together: J parts of R rows, with one set each
  run    members of a set that are gathered at once, at most `capacity`
  chunk  keys that dense attention scores at once
  piece  what a walk over keys takes at a time: a chunk, or the next runs of the list
  pass   one time through a loop over survivors
"""
