"""The digits' classes and layouts."""

import pytest

from common.cli import UserError
from p1_ddpm.digits import DOMAINS, LAYOUTS, joint_label, keep_layout, read_digits


def test_joint_classes_follow_one_another():
    joint = [joint_label(DOMAINS, domain, digit) for domain in DOMAINS for digit in range(10)]
    assert joint == list(range(20))
    assert joint_label({"a": 3, "b": 2, "c": 4}, "c", 1) == 6


@pytest.mark.parametrize(("domain", "label", "complaint"), [("usps", 1, "domain usps"), ("svhn", 10, "class 10")])
def test_unknown_classes_are_refused(domain, label, complaint):
    with pytest.raises(UserError, match=complaint):
        joint_label(DOMAINS, domain, label)


@pytest.mark.parametrize("layout", ["2024", "2025"])
def test_a_layout_keeps_its_digits(digits, layout):
    for domain, every in read_digits(digits, size=8).items():
        images, expected = keep_layout(every, domain, layout), LAYOUTS[layout][domain]
        assert sorted(set(images.labels.tolist())) == list(expected)
        assert len(images) == 4 * len(expected)


def test_one_domain_is_enough_and_none_is_refused(digits, tmp_path):
    (tmp_path / "svhn").symlink_to(digits / "svhn")
    assert list(read_digits(tmp_path, size=8)) == ["svhn"]
    with pytest.raises(UserError, match=r"absent: holds neither mnistm/train.csv nor svhn/train.csv"):
        read_digits(tmp_path / "absent")


def test_labels_beyond_nine_are_refused(digits, tmp_path):
    (tmp_path / "svhn").mkdir()
    (tmp_path / "svhn" / "data").symlink_to(digits / "svhn" / "data")
    (tmp_path / "svhn" / "train.csv").write_text("image_name,label\n00000.png,3\n00001.png,10\n")
    with pytest.raises(UserError, match=r"svhn/train.csv row 3: label '10': labels are 0 to 9"):
        read_digits(tmp_path)
