"""The documents: every link leads somewhere, every command is one that its script takes, and formulas survive Markdown."""
import inspect
import re
import runpy
import shlex
from functools import cache
from urllib.parse import urlparse

import pytest
from conftest import ROOT

from kronygpt.configurator import UserError, configure

DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
LINK = re.compile(r"\[[^\]]*\]\(([^)]*)\)")


def prose_and_code(document):
    """The lines of a document that are text, and those of its code blocks, indented or fenced."""
    prose, code, fence = [], [], None
    for line in (ROOT / document).read_text(encoding="utf-8").splitlines():
        mark = re.match(r" *(```+|~~~+)", line)
        if mark and (fence is None or mark[1] == fence):
            fence = None if fence else mark[1]
        elif fence or line.startswith("    "):
            code.append(line.strip())
        else:
            prose.append(line)
    return "\n".join(prose), "\n".join(code)


def without_code_spans(prose):
    return re.sub(r"`[^`]*`", "", prose)


def anchors(document):
    """The anchors that GitHub makes of the headings of a document."""
    found = []
    for heading in re.findall(r"^#+ +(.*)$", prose_and_code(document)[0], re.MULTILINE):
        text = LINK.sub(lambda link: link[0][1:].partition("]")[0], heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    for link in LINK.findall(without_code_spans(prose_and_code(document)[0])):
        if re.match(r"\w+:", link):
            url = urlparse(link)
            assert url.scheme in ("http", "https") and "." in url.netloc and " " not in link, link
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent.joinpath(path).resolve() if path else ROOT / document
        assert target.exists() and target.is_relative_to(ROOT), f"{link}: there is no such file in the repository"
        assert not anchor or anchor in anchors(str(target.relative_to(ROOT))), f"{link}: no heading has this anchor"


@cache
def load(script):
    """The globals of a script that does not run its main()."""
    return runpy.run_path(str(ROOT / script), run_name="read")


def check_command(command):
    """Parse the arguments of `python X.py ...` or `torchrun ... X.py ...` as X.py would."""
    launcher, *words = shlex.split(re.sub(r"<[^>]*>", "placeholder", command), comments=True)
    if words[:1] == ["-m"]:
        words = [words[1].replace(".", "/") + ".py", *words[2:]]
    n_options = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words))
    assert n_options < len(words), "no script"
    assert launcher == "torchrun" or not n_options, "an option of python"
    script, args = words[n_options], words[n_options + 1:]
    assert (ROOT / script).is_file(), f"no script {script}"
    if args == ["--help"]:
        return
    namespace = dict(load(script))
    parameters = inspect.signature(namespace["main"]).parameters.values()
    positionals = configure(namespace, args, takes_positionals=bool(parameters))
    required = [p for p in parameters if p.default is inspect.Parameter.empty]
    assert len(required) <= len(positionals) <= len(parameters), f"{script} takes {len(parameters)} arguments"


def commands(code, prose=""):
    """The commands that start a script, in one line each: lines of code blocks, and code spans in a text."""
    lines = re.sub(r"\\\n\s*", "", code).splitlines() + [" ".join(span.split()) for span in re.findall(r"`([^`]*)`", prose)]
    return [line for line in lines if re.match(r"(python|torchrun) (?!-c |llama\.cpp/)", line)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_one_that_its_script_takes(document, monkeypatch):
    monkeypatch.chdir(ROOT)  # config files are named from there
    prose, code = prose_and_code(document)
    for command in commands(code, prose):
        try:
            check_command(command)
        except (AssertionError, FileNotFoundError, UserError) as error:
            pytest.fail(f"{command}: {error}")


@pytest.mark.parametrize("config", sorted(path.name for path in ROOT.glob("config/*.py")))
def test_the_commands_above_a_recipe_are_ones_that_their_scripts_take(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = (ROOT / "config" / config).read_text(encoding="utf-8").splitlines()
    for command in commands("\n".join(line.lstrip("# ") for line in lines if line.startswith("#   "))):
        check_command(command)


@pytest.mark.parametrize("command", ["python train.py --max_itres=3", "python train.py config/none.py", "python no.py",
                                     "python perplexity.py", "python sample.py a b c", "torchrun --standalone"])
def test_a_wrong_command_is_noticed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert commands(f"{command}   # why") == [f"{command}   # why"]
    with pytest.raises((AssertionError, FileNotFoundError, UserError)):
        check_command(command)


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    targets = set(re.findall(r"^([\w./-]+):(?!=)", makefile, re.MULTILINE))
    for document in DOCUMENTS:
        prose, code = prose_and_code(document)
        for text in (*code.splitlines(), *re.findall(r"`([^`]*)`", prose)):
            if named := re.match(r"make ([\w./-]+)", text):
                assert named[1] in targets, f"{document}: make {named[1]}"


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if "$$" in (ROOT / d).read_text(encoding="utf-8")])
def test_formulas_survive_markdown(document):
    """GitHub reads Markdown before the formulas: it removes a backslash before punctuation, takes `}_{` for the beginning of
    emphasis, and knows inline formulas by the space or punctuation around their dollars."""
    parts = without_code_spans(prose_and_code(document)[0]).split("$$")
    assert len(parts) % 2, "a $$ without its partner"
    for before, block, behind in zip(parts[::2], parts[1::2], parts[2::2]):
        assert before.endswith("\n\n") and behind.startswith("\n\n"), f"a display needs blank lines around it: {block}"
        assert not re.search(r"\\[^A-Za-z]|[})\]]_|\*|\n\n", block.strip()), block
    for text in parts[::2]:
        for paragraph in re.split(r"\n\s*\n", text):
            assert paragraph.count("$") % 2 == 0, f"an odd number of dollars: {paragraph}"
            for formula in re.finditer(r"(.?)\$([^$]*)\$(.?)", paragraph, re.DOTALL):
                before, inside, behind = formula.groups()
                assert inside.strip() == inside and not re.search(r"\\[^A-Za-z]|[})\]]_|\*|\n|\|", inside), f"${inside}$"
                assert not before.isalnum() and not behind.isalnum(), f"no space around ${inside}$"
