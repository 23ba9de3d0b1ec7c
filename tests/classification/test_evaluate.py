import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import average_precision_score, balanced_accuracy_score, confusion_matrix

from cvjax.classification.evaluate import (
    Calibration,
    Confusion,
    MeanAveragePrecision,
    expected_calibration_error,
    temperature,
)
from cvjax.errors import InputError

rng = np.random.default_rng(0)
LOGITS = rng.normal(0, 2, (50, 4))
LABELS = rng.integers(0, 3, 50)  # class 3 never occurs
IMAGES = rng.random((50, 6, 5, 3)).astype(np.float32)


def batches(evaluator, size=16, labels=LABELS):
    """The whole set, its last batch padded with what must not count."""
    for first in range(0, 50, size):
        rows = np.arange(first, first + size)
        valid = rows < 50
        rows = np.minimum(rows, 49)
        logits = np.where(valid[:, None], LOGITS[rows], np.nan)
        outputs = {"logits": logits, "probabilities": softmax(logits, -1)}
        batch = {"label": labels[rows], "image": IMAGES[rows], "valid": valid}
        evaluator.add(outputs, batch)
    return evaluator


def test_confusion_and_accuracy_of_classes():
    evaluator = batches(Confusion())
    prediction = LOGITS.argmax(-1)
    np.testing.assert_array_equal(
        evaluator.matrix, confusion_matrix(LABELS, prediction, labels=range(4))
    )
    found = evaluator.result()
    # scikit-learn warns of class 3, which is predicted but never true; it is left out by both.
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = balanced_accuracy_score(LABELS, prediction)
    assert found["balanced_accuracy"] == pytest.approx(expected)
    assert "accuracy/3" not in found
    assert found["accuracy/1"] == pytest.approx(np.mean(prediction[LABELS == 1] == 1))


def test_two_classes_of_one_name():
    """ImageNet has two cranes."""
    evaluator = Confusion(class_names=np.array(["crane", "crane", "tit"]))
    probabilities = np.float32([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    batch = {
        "label": np.array([0, 1, 1]),
        "valid": np.ones(3, bool),
        "image": np.zeros((3, 2, 2, 1)),
    }
    evaluator.add({"probabilities": probabilities}, batch)
    accuracy = {"accuracy/crane (0)": 1.0, "accuracy/crane (1)": 0.5}
    assert evaluator.result() == {"balanced_accuracy": 0.75, **accuracy}


def test_the_worst_mistakes_come_first():
    evaluator = batches(Confusion(mistakes=3))
    p = softmax(LOGITS, -1)
    wrong = np.flatnonzero(p.argmax(-1) != LABELS)
    worst = wrong[np.argsort(-p[wrong].max(-1))][:3]
    picture = evaluator.pictures()["mistakes"]
    assert picture.shape == (8, 3 * 6 + 1, 3)  # one row, a pixel of padding
    for place, row in enumerate(worst):
        np.testing.assert_array_equal(picture[1:7, 1 + 6 * place : 6 * place + 6], IMAGES[row])


def test_mistakes_among_images_of_many_channels_are_shown_by_their_first_three():
    evaluator = Confusion(mistakes=1)
    image = np.arange(4 * 3 * 5, dtype=np.float32).reshape(1, 4, 3, 5) / 60
    outputs = {"probabilities": np.array([[0.9, 0.1]])}
    evaluator.add(outputs, {"label": np.array([1]), "image": image, "valid": np.ones(1, bool)})
    picture = evaluator.pictures()["mistakes"]
    np.testing.assert_array_equal(picture[1:-1, 1:-1], image[0, ..., :3])


def test_without_mistakes_there_is_no_picture_of_them():
    evaluator = batches(Confusion(), labels=LOGITS.argmax(-1))
    assert set(evaluator.pictures()) == {"confusion"}
    assert evaluator.result()["balanced_accuracy"] == 1


@pytest.mark.parametrize("evaluator", [Confusion, Calibration, MeanAveragePrecision])
def test_nothing_was_added(evaluator):
    empty = evaluator()
    assert empty.result() == {}
    label = np.zeros((2, 3)) if evaluator is MeanAveragePrecision else np.zeros(2, int)
    outputs = {"logits": np.zeros((2, 3)), "probabilities": np.full((2, 3), 1 / 3)}
    empty.add(outputs, {"label": label, "image": IMAGES[:2], "valid": np.zeros(2, bool)})
    assert empty.result() == {}


def slow_ece(p, labels, bins):
    total = 0.0
    for i in range(bins):
        low, high = i / bins, (i + 1) / bins
        inside = [
            n for n in range(len(p)) if low < p[n].max() <= high or (i == 0 and p[n].max() == 0)
        ]
        if inside:
            accuracy = np.mean([p[n].argmax() == labels[n] for n in inside])
            total += len(inside) / len(p) * abs(accuracy - np.mean([p[n].max() for n in inside]))
    return total


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error(bins):
    p = softmax(LOGITS, -1)
    p[:3] = np.eye(4)[:3]  # sure: the last bin is closed above
    assert expected_calibration_error(p, LABELS, bins) == pytest.approx(slow_ece(p, LABELS, bins))


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_the_temperature_is_the_one_that_made_the_labels(scale):
    """Labels drawn from softmax(logits): logits that are `scale` times too large need that T.

    The fit on 200,000 examples has a standard error of about 0.3 %.
    """
    draws = np.random.default_rng(1)
    logits = draws.normal(0, 2, (200_000, 3))
    labels = (logits + draws.gumbel(size=logits.shape)).argmax(-1)
    assert temperature(scale * logits, labels) == pytest.approx(scale, rel=0.02)


def test_scaling_mends_what_is_overconfident():
    found = batches(Calibration()).result()
    assert found["temperature"] > 1  # the labels have nothing to do with the logits
    assert found["ece_scaled"] < found["ece"]


def test_calibration_has_the_bins_that_are_asked_for():
    labels = (LOGITS + np.random.default_rng(1).gumbel(size=LOGITS.shape)).argmax(-1)
    found = batches(Calibration(4), labels=labels).result()
    scaled = softmax(LOGITS / found["temperature"], -1)
    for name, p in (("ece", softmax(LOGITS, -1)), ("ece_scaled", scaled)):
        assert found[name] == pytest.approx(slow_ece(p, labels, 4))
        assert found[name] != pytest.approx(slow_ece(p, labels, 15))


def test_mean_average_precision():
    targets = (np.random.default_rng(2).random((50, 4)) < 0.3).astype(np.float32)
    targets[:, 2] = 0
    found = batches(MeanAveragePrecision(), labels=targets).result()
    each = [average_precision_score(targets[:, i], LOGITS[:, i]) for i in (0, 1, 3)]
    assert found["map"] == pytest.approx(np.mean(each))
    for score, expected in ((-np.inf, 1.0), (np.nan, np.nan)):  # the one of a class ruled out
        evaluator = MeanAveragePrecision()
        logits = np.array([[score, 1.0], [2.0, score]])
        evaluator.add({"logits": logits}, {"label": np.eye(2)[::-1], "valid": np.ones(2, bool)})
        np.testing.assert_equal(evaluator.result()["map"], expected)
    with pytest.raises(InputError, match=r"label is \[16\]; for logits \[16, 4\]"):
        batches(MeanAveragePrecision(), labels=LABELS)


@pytest.mark.parametrize("bins", [10, 15, 25, 29, 35])
def test_a_confidence_on_an_edge_is_in_the_lower_bin(bins):
    """Were 7 / 25 taken for the eighth bin, right and wrong there would cancel out."""
    for number in range(1, bins):
        edge = number / bins
        above = np.nextafter(edge, 1)
        p = np.array([[edge, -1.0], [above, -1.0]])
        # Gaps of 1 - edge and of -edge: in one bin they would be 1 - 2 edge.
        found = expected_calibration_error(p, np.array([0, 1]), bins)
        np.testing.assert_allclose(found, 0.5, rtol=1e-12)


def test_settings_of_evaluators_that_make_no_sense():
    with pytest.raises(InputError, match="bins is 0"):
        Calibration(bins=0)
    with pytest.raises(InputError, match="mistakes is -1"):
        Confusion(mistakes=-1)
    for names in ("abc", "abcde"):
        with pytest.raises(InputError, match=f"{len(names)} names, but there are 4 classes"):
            batches(Confusion(names))
    assert "mistakes" not in batches(Confusion(mistakes=0)).pictures()


@pytest.mark.parametrize("evaluator", [Confusion, Calibration])
def test_a_label_that_is_no_class_is_refused(evaluator):
    """-1 would be the last class."""
    for label, message in (
        (-1, "label is -1, but num_classes is 4: classes are 0..3"),
        (4, "label is 4"),
    ):
        with pytest.raises(InputError, match=f"{evaluator.__name__}: {message}"):
            batches(evaluator(), labels=np.where(np.arange(50) == 7, label, LABELS))
    for labels, message in (
        (np.ones((50, 4)), "must sum to 1"),
        (LABELS[:, None], r"label is int64 \[16, 1\]"),
        (LABELS + 0.5, "label is float64"),
    ):
        with pytest.raises(InputError, match=f"{evaluator.__name__}: .*{message}"):
            batches(evaluator(), labels=labels)


def test_soft_labels_are_their_most_probable_class():
    soft = 0.9 * np.eye(4, dtype=np.float32)[LABELS] + 0.025
    np.testing.assert_array_equal(
        batches(Confusion(), labels=soft).matrix, batches(Confusion()).matrix
    )
    assert batches(Calibration(), labels=soft).result() == batches(Calibration()).result()


def test_the_picture_of_a_thousand_classes_is_no_larger_than_they_need():
    evaluator = Confusion()
    evaluator.matrix = np.eye(1000, dtype=np.int64)
    assert evaluator.pictures()["confusion"].shape == (1000, 1000, 1)
