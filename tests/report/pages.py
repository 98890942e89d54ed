"""What tests look for on pages."""

import json
import re
from html.parser import HTMLParser


def measure(run, engine, perplexity, *, precision="fp32", base=None):
    """What eval.json says of the model that lies in a run."""
    record = json.loads((run / "model" / "lpdeploy.json").read_text())

    def score(value):
        return {"perplexity": {"t/v.txt": {"perplexity": value, "bits_per_byte": 1, "tokens": 3}}}

    data = {"model": "m", "model_sha256": record["sha256"], "engine": engine, "seq_len": 16}
    data |= {"precision": precision, **score(perplexity)}
    return data if base is None else data | {"base": score(base)}


def read_words(page):
    """Return what a reader sees of a page, with single spaces."""
    text = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


def check_nesting(page):
    """Check that every element is closed in its order."""
    void = {"meta", "link"}
    stack = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, _):
            if tag not in void:
                stack.append(tag)

        def handle_startendtag(self, tag, _):
            """Pass over what ends where it begins, as much of SVG does."""

        def handle_endtag(self, tag):
            if tag not in void:
                assert stack.pop() == tag

    Checker().feed(page)
    assert stack == []
