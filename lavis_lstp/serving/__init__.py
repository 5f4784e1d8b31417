"""One process for browsers and for programs: an OpenAI-compatible API and a page over one predictor.

What comes from outside is hostile until checked: `files` and `media` admit videos and pictures by content, `protocol`
admits messages and settings, and nothing of a request becomes a path, an address that is fetched, or HTML.
"""
