"""Code that names something public is a link to where the reference tells of it."""

import inspect

from docutils import nodes
from sphinx import addnodes

import hsrjax

PUBLIC = {f"hsrjax.{name}" for name in hsrjax.__all__}
for module in (hsrjax.reference, hsrjax.theory):
    PUBLIC |= {
        f"{module.__name__}.{name}"
        for name, thing in vars(module).items()
        if inspect.isfunction(thing) and thing.__module__ == module.__name__
    }


def near(name):
    """What says, of code in the docstring of a name, which public name it is."""
    place = name.rpartition(".")[0] if name in PUBLIC else "hsrjax"
    return lambda code: target(code, place) or target(code, "hsrjax")


def target(code, place):
    """The full name of code such as `build(keys)` or `Info.count`, or None."""
    words = code.split("(")[0].removeprefix("hsrjax.")
    full = f"{place}.{words}"
    if full in PUBLIC:
        return full
    owner, _, attribute = full.rpartition(".")
    known = owner in PUBLIC and inspect.isclass(getattr(hsrjax, owner[7:], None))
    return full if known and hasattr(getattr(hsrjax, owner[7:]), attribute) else None


def link_code(app, doctree):
    """Links `hsrjax.NAME` in the text of a page, but in its headings."""
    for literal in list(doctree.findall(nodes.literal)):
        code = literal.astext()
        full = target(code, "hsrjax") if code.startswith("hsrjax.") else None
        free = isinstance(literal.parent, (nodes.paragraph, nodes.strong, nodes.entry))
        if full and free:
            link = addnodes.pending_xref(
                "",
                literal.deepcopy(),
                refdomain="py",
                reftype="obj",
                reftarget=full,
                refexplicit=True,
                refdoc=app.env.docname,
                refwarn=True,
            )
            literal.replace_self(link)


def setup(app):
    """Connects the hook."""
    app.connect("doctree-read", link_code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
