"""Let mkdocstrings read the docstrings, which are written in the style of transformers."""

import re

import griffe


class TransformersStyle(griffe.Extension):
    """Turn ``[`Name`]`` into a link and ``name (`float`, *optional*):`` into a type without markup."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( +[\w, ]+)\((.*?)\):", plain_type, obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r"\[`([\w.]+)`\](?![\[(])", link, obj.docstring.value)


def plain_type(found: re.Match) -> str:
    """Return the name and the type of an argument without backticks and stars; the default is in the signature."""
    kind = re.sub(r", defaults? (to )?.*|, \*optional\*", "", found[2]).replace("`", "")
    return f"{found[1]}({kind}):"


def link(found: re.Match) -> str:
    """Return a link to a public name, which is plain code where the page has no such name."""
    return f'<autoref optional identifier="hf_maskselect.{found[1]}"><code>{found[1]}</code></autoref>'
