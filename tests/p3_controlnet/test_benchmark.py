"""The ControlNet's speed program: its peer does the same work as ours."""

from benchmarks import speed
from p3_controlnet import fill50k


def test_diffusers_pipeline_draws_our_pictures(pipeline_folder, controlnet_folder, tmp_path):
    fill50k.main(fill50k.parse_arguments([str(tmp_path), "--count", "3", "--size", "64"]))
    flags = ["--images", 4, "--steps", 2, "--batch-size", 2, "--precision", "fp32", "--repeats", 1]
    weights = ["--base", pipeline_folder, "--controlnet", controlnet_folder, "--examples", tmp_path]
    figures = speed.main(speed.parse_arguments([str(argument) for argument in ("p3", *weights, *flags)]))
    assert figures["difference"]["diffusers"]["mean"] <= 0.1
    assert figures["times_ours"].keys() == {"ours", "diffusers"}
