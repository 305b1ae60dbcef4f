"""The texts from which the text tower of `nano` learns.

Four groups: every lemma of WordNet, the definitions of its nouns, compositions ("a small red chair with
wheels"), and what is written about the training shapes. Names that only test shapes carry are held out, and
2,000 lemmas too.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cg3d.core.errors import MissingFile
from cg3d.io.collection import Collection
from cg3d.models.templates import fill_template

WORDNET_HINT = "apt-get download wordnet-base && dpkg -x wordnet-base_*.deb FOLDER"


def read_wordnet(
    folder: str | Path,  # with data.noun, data.adj, data.verb; in Debian's wordnet-base usr/share/wordnet
) -> tuple[list[str], list[tuple[str, str]]]:  # lemmas, sorted; (first word, definition) of each noun sense
    """Words and definitions of WordNet 3 (format: man 5 wndb).

    Raises: `MissingFile` if one of the three files is missing.
    """
    lemmas, senses = set(), []
    for kind in ("noun", "adj", "verb"):
        path = Path(folder) / f"data.{kind}"
        if not path.is_file():
            message = f"{path}: no such file; get it with `{WORDNET_HINT}` and give FOLDER/usr/share/wordnet"
            raise MissingFile(message, file=path)
        for line in path.read_text(encoding="latin1").splitlines():
            if line.startswith(" "):
                continue  # license text
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            count = int(fields[3], 16)  # words of the sense
            words = [re.sub(r"\(.*?\)", "", fields[4 + 2 * i]).replace("_", " ") for i in range(count)]
            lemmas.update(words)
            if kind == "noun":
                senses.append((words[0], gloss.split('"')[0].strip().rstrip(";")))
    return sorted(lemmas), senses


COLORS = """red green blue yellow orange purple pink brown black white grey gray beige golden silver dark
light wooden metal plastic glass stone leather fabric marble""".split()
FORMS = """small large tall low long short wide narrow round square rectangular flat curved thin thick tiny
big old modern simple low-poly empty open closed""".split()
PARTS = (
    "legs|arms|a round top|a curved back|wheels|drawers|a handle|two doors|a thin stem|a flat base|a lid|leaves|"
    "windows|a pointed tip|a wide seat|stripes|a long neck|a cushion|shelves|a roof"
).split("|")
SENTENCES = (
    "a {}|the {}|a photo of a {}|a 3d model of a {}|a rendering of a {}|this is a {}|a point cloud of a {}|"
    "there is a {} in the scene|{}s|an image of one {}"
).split("|")


def compositions(
    names: Sequence[str],  # of training shapes
    words: Sequence[str],  # any others
    rng: random.Random,
    count: int = 60_000,  # drawn, before duplicates are removed
) -> list[str]:  # sorted
    "Sentences with colors, forms and parts."
    sentences = {template.format(name) for name in names for template in rng.sample(SENTENCES, 4)}
    all_words = [*names, *words]
    for _ in range(count):
        name = rng.choice(names) if rng.random() < 0.6 else rng.choice(all_words)
        kind = rng.random()
        if kind < 0.3:
            sentence = f"a {rng.choice(COLORS)} {name}"
        elif kind < 0.5:
            sentence = f"a {rng.choice(FORMS)} {rng.choice(COLORS)} {name}"
        elif kind < 0.7:
            sentence = f"a {rng.choice(FORMS)} {name} with {rng.choice(PARTS)}"
        elif kind < 0.9:
            color, part_color = rng.choice(COLORS), rng.choice(COLORS)
            sentence = f"a {color} {name} with {part_color} {rng.choice(PARTS).replace('a ', '')}"
        else:
            sentence = rng.choice(SENTENCES).format(name)
        sentences.add(sentence)
    return sorted(sentences)


def training_rows(
    collection: Collection,  # with a column split
) -> np.ndarray:  # row numbers of everything but the test split
    "Rows to learn from."
    return np.flatnonzero(collection.table["split"].to_numpy() != "test")


def corpus(
    collection: Collection,  # names, categories, captions, queries, tags; the test split is left out
    wordnet: str | Path,  # folder, see `read_wordnet`
    held_out: int = 2000,  # lemmas that are set aside
    count: int = 60_000,  # compositions drawn
    seed: int = 0,
) -> dict[str, list[str]]:  # lemma, gloss, comp, shape to learn from; held_lemma and held_name to test with
    "Texts for the text tower; raises as `read_wordnet`."
    rng, (lemmas, senses), table = random.Random(seed), read_wordnet(wordnet), collection.table
    training = table.iloc[training_rows(collection)]
    held_names = sorted(set(table["name"]) - set(training["name"]) - set(training["category"]))
    glosses = []
    for word, gloss in senses:
        glosses.append(gloss)
        if len(gloss) < 70 and rng.random() < 0.35:
            glosses.append(f"{word}, {gloss}")
    held_lower = {name.lower() for name in held_names}
    lemmas = [word for word in lemmas if word.lower() not in held_lower]
    rng.shuffle(lemmas)
    held_lemmas, lemmas = lemmas[:held_out], lemmas[held_out:]
    names = sorted((set(training["name"]) | set(training["category"])) - {""})
    tags = sorted({tag.strip().lower() for line in training["tags"] for tag in line.split(",")} - {""})
    texts = [text for column in ("caption", "query") for text in training[column] if text]
    short_words = [word for word in lemmas if len(word) < 10 and word.islower()][:8000]
    return {
        "lemma": lemmas,
        "gloss": glosses,
        "comp": compositions(names, short_words, rng, count),
        "shape": texts + names + tags,
        "held_lemma": held_lemmas,
        "held_name": held_names,
    }


def row_texts(
    collection: Collection,
) -> dict[str, list[str]]:  # name, caption, query, category; one text per row each
    "The texts whose embeddings are the targets of a picture or cloud of each row."
    table = collection.table
    queries = table["query"] if "query" in table else [""] * len(table)
    nouns = [category or name for category, name in zip(table["category"], table["name"])]
    return {
        "name": [fill_template("a {}", name) for name in table["name"]],
        "caption": list(table["caption"]),
        "query": [query or caption for query, caption in zip(queries, table["caption"])],
        "category": [fill_template("a {}", noun) for noun in nouns],
    }
