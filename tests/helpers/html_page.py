"""An HTML page, parsed strictly enough to assert what stands in it."""

from html.parser import HTMLParser

VOID = {"meta", "img", "source", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Text, tables and attributes of a page; fails on tags that are not closed in order."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.seen, self.rows = [], [], []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, *start):
        (found,) = [row for row in self.rows if tuple(row[: len(start)]) == start]
        return found

    def attributes(self, tag):
        return [attrs for name, attrs in self.seen if name == tag]


def check_alone(html):
    """Nothing is fetched, and no script runs."""
    page = Page(html)
    policy = next(str(a["content"]) for a in page.attributes("meta") if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;") and "<script" not in html
    assert not any(part in html for part in ("@import", "http://", "https://"))
    for _, attributes in page.seen:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "srcset", "href"):
                assert str(value).startswith("#" if name == "href" else "data:image/")
    assert all(head.get("scope") in ("col", "row") for head in page.attributes("th"))
