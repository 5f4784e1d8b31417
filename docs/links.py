"""A hook of mkdocs: the pages beside docs/ belong to the site, and links between all of them keep working.

In: Markdown whose links are right in the repository. Out: the same with links that are right on the site, where docs/
is the root and README.md its first page.
"""

import posixpath
import re

from mkdocs.structure.files import File

PLACES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "projects/lstp/README.md": "projects/lstp/README.md",
}
"""Path in the repository -> path on the site, of pages that are not in docs/."""


def on_files(files, config):
    root = posixpath.dirname(config.config_file_path)
    for path, place in PLACES.items():
        files.append(File.generated(config, place, abs_src_path=posixpath.join(root, path)))
    return files


def on_page_markdown(markdown, page, config, files):
    root = posixpath.dirname(config.config_file_path)
    here, there = posixpath.relpath(page.file.abs_src_path, root), page.file.src_uri

    def moved(match):
        link, _, anchor = match[1].partition("#")
        if "://" in link or not link:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
        place = PLACES.get(path) or path.removeprefix("docs/")
        return f"]({posixpath.relpath(place, posixpath.dirname(there))}{'#' if anchor else ''}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, markdown)
