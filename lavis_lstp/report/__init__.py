"""`lavis-lstp report OUT`: one page about evaluations, in a file that needs nothing but a browser.

`evaluations` finds predictions, verdicts and timings, `numbers` makes tables of them, `pictures` reads the frames that
were chosen, `page` draws it all into HTML; `shell` is the frame that every page of this package has.
"""
