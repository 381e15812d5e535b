"""Views: the samples of another store, found where that lies."""

import json
import shutil

import numpy as np
import pytest

from pretrain.data.annotate import prepared_stores
from pretrain.data.annotation_writer import AnnotationWriter
from pretrain.data.annotations import Annotation, folder_of
from pretrain.data.store import Store
from pretrain.data.view import write_view
from pretrain.errors import UserError
from tests.training.runs import write_corpus

KEPT = np.array([3, 4, 9, 17, 40])


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", samples=41, heldout=5)


def view(folder, corpus, kept=KEPT):
    folder.mkdir()
    write_view(folder, corpus, kept, folder, filter={"kept": 5})
    return Store(folder / "train")


def test_a_view_shows_the_kept_samples_and_copies_no_token(tmp_path, corpus):
    whole, shown = Store(corpus / "train"), view(tmp_path / "view", corpus)
    assert len(shown) == 5 and shown.max_length == max(len(whole[i]) for i in KEPT)
    assert shown.meta["tokens"] == sum(len(whole[i]) for i in KEPT) and shown.meta["filter"] == {"kept": 5}
    for new, old in enumerate(KEPT):
        assert shown[new].tolist() == whole[old].tolist()
    assert not list((tmp_path / "view").rglob("tokens*.bin"))
    assert shown.source.folder.resolve() == whole.folder.resolve() and whole.source is whole
    counts = np.bincount(np.concatenate([whole[i] for i in KEPT]), minlength=99)
    assert (
        shown.token_counts(99).tolist() == counts.tolist() and shown.token_counts(99, sampled=20).sum() < counts.sum()
    )


def test_the_held_out_part_is_unchanged_and_the_tokenizer_comes_along(tmp_path, corpus):
    shown = view(tmp_path / "view", corpus)
    heldout, before = Store(tmp_path / "view" / "heldout"), Store(corpus / "heldout")
    assert heldout.fingerprint == before.fingerprint
    assert [heldout[i].tolist() for i in range(5)] == [before[i].tolist() for i in range(5)]
    assert shown.meta["tokenizer"] if "tokenizer" in Store(corpus / "train").meta else True
    for file in (corpus / "tokenizer").iterdir():
        assert (tmp_path / "view" / "tokenizer" / file.name).read_bytes() == file.read_bytes()


def test_views_of_other_samples_have_other_fingerprints(tmp_path, corpus):
    prints = {Store(corpus / "train").fingerprint}
    for number, kept in enumerate((KEPT, KEPT[:4], KEPT[::-1])):
        prints.add(view(tmp_path / f"view{number}", corpus, kept).fingerprint)
    assert len(prints) == 4


def test_a_view_of_a_view_is_one_of_the_store_with_the_tokens(tmp_path, corpus):
    view(tmp_path / "view", corpus)
    shown = view(tmp_path / "second", tmp_path / "view", np.array([1, 4]))
    shutil.rmtree(tmp_path / "view")
    assert [shown[i].tolist() for i in range(2)] == [Store(corpus / "train")[i].tolist() for i in (4, 40)]


def test_a_view_moves_with_its_store(tmp_path, corpus):
    (tmp_path / "both").mkdir()
    shown = view(tmp_path / "view", corpus)
    expected = shown[2].tolist()
    corpus.rename(tmp_path / "both" / "corpus")
    (tmp_path / "view").rename(tmp_path / "both" / "view")
    assert Store(tmp_path / "both" / "view" / "train")[2].tolist() == expected


def test_a_view_without_its_store_is_one_line(tmp_path, corpus):
    view(tmp_path / "view", corpus)
    corpus.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"is a view of .*corpus.*put it back, or make the view again with 'medley fil"):
        Store(tmp_path / "view" / "train")
    write_corpus(corpus, samples=30, heldout=5, seed=1)
    with pytest.raises(UserError, match="is a view of another store than there is"):
        Store(tmp_path / "view" / "train")


def test_a_view_has_the_annotations_of_its_store(tmp_path, corpus):
    whole, shown = Store(corpus / "train"), view(tmp_path / "view", corpus)
    writer = AnnotationWriter(folder_of(whole, "test"), "spans", {}, whole.fingerprint)
    writer.append(np.concatenate([np.zeros(n, int) for n in whole.lengths[:]]), whole.lengths[:])
    writer.finish()
    writer.publish()
    annotation = Annotation(shown, "test", "spans")
    assert len(annotation.units) == len(whole.tokens) and annotation.folder.is_relative_to(corpus.resolve())
    with pytest.raises(UserError, match=r"is a view of .*corpus, whose annotations it has; annotate that"):
        prepared_stores(tmp_path / "view")


def test_an_empty_view_opens(tmp_path, corpus):
    shown = view(tmp_path / "view", corpus, np.array([], int))
    assert len(shown) == 0 and shown.max_length == 0 and json.loads((tmp_path / "view/train/meta.json").read_text())
