"""Who says whether an answer is right: rules, a language model over HTTP or on this machine, or a record of either.

`rows` reads what is judged, `rules` decides what needs no judge, `endpoint`, `local` and `replay` are judges, `cache`
keeps each verdict, `scores` makes numbers of verdicts, `judge`, `compare` and `calibrate` are the commands.
"""
