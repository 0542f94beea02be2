"""What scale.py counts is what a sum over the layers says, and the page holds what it prints."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import scale, scale_tables
from benchmarks.counting import Count, count
from benchmarks.projection import Assumptions, Machine, exchange_seconds, projected, training_rates
from benchmarks.workloads import MEASURED, MINIATURE_HINT_CHANNELS, OWN_FACES, WORK, Work, digits
from common.cli import UserError
from p1_ddpm import sample as p1_sample
from p1_ddpm import train as p1_train
from p2_ddim import sample as p2_sample
from p2_ddim import train as p2_train
from p3_controlnet import sample as p3_sample
from p3_controlnet import train as p3_train
from p3_controlnet.model import ControlNet


def layer_flops(models, run) -> int:
    """Operations of all convolutions, linear layers and attentions that run, from the sizes of their tensors."""
    total, attention = 0, nn.functional.scaled_dot_product_attention

    def add(layer, inputs, output):
        nonlocal total
        total += 2 * output.numel() * (layer.weight.numel() // layer.weight.shape[0])

    def attend(query, key, value, **options):
        nonlocal total
        total += 2 * query.numel() * key.shape[-2] * 2
        return attention(query, key, value, **options)

    layers = [m for model in models for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", attend)
        run()
    for handle in handles:
        handle.remove()
    return total


class TestCount:
    def test_a_linear_layer(self):
        with torch.device("meta"), torch.no_grad():
            layer, x = nn.Linear(30, 20, bias=False), torch.empty(10, 30)
            assert count(lambda: layer(x)) == Count(2 * 10 * 30 * 20, 4 * (300 + 600 + 200), 1, 4 * 200)

    def test_a_step_through_two_layers(self):
        """Backward takes a product for each weight and, but for the first layer, one for the input."""
        with torch.device("meta"):
            layers, x = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 7)), torch.empty(10, 30)
            found = count(lambda: layers(x).sum().backward())
        assert found.flops == 2 * 10 * (30 * 20 * 2 + 20 * 7 * 3)

    def test_memory_is_given_back(self):
        with torch.device("meta"), torch.no_grad():
            x = torch.empty(1000)
            assert count(lambda: x.relu().relu().relu().relu()) == Count(0, 4 * 8000, 4, 4 * 2000)

    def test_memory_that_the_backward_pass_needs_is_kept(self):
        with torch.device("meta"):
            x = torch.empty(1000, requires_grad=True)
            found = count(lambda: x.exp().exp().exp().exp())
        assert found.peak == 4 * 4000

    def test_attention_never_holds_its_table(self):
        with torch.device("meta"), torch.no_grad():
            q = torch.empty(2, 4, 4096, 40)
            found = count(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
        assert found.flops == 2 * 2 * 2 * 4 * 4096 * 4096 * 40
        assert found.peak < 4 * 4 * q.numel()
        assert found.kernels == 1

    def test_broadcast_values_count_once(self):
        with torch.device("meta"), torch.no_grad():
            x, one = torch.empty(100, 100), torch.empty(1).expand(100, 100)
            assert count(lambda: x + one).bytes == 4 * (10_000 + 1 + 10_000)

    def test_parts_add_up(self):
        assert Count(1, 2, 3, 4) * 5 + Count(1, 1, 1, 9) == Count(6, 11, 16, 9)


class TestWork:
    def test_digits_are_the_sum_of_their_layers(self):
        with torch.device("meta"):
            work = digits("fp32")
            with torch.no_grad():
                layers = layer_flops(work.models, lambda: work.predict(1))
            picture = work.one_picture()
        assert picture.flops == 10 * layers

    def test_digits_on_the_processor_count_the_same(self):
        work = digits("fp32")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            work.predict(1)
        with torch.device("meta"):
            assert 10 * counter.get_total_flops() == digits("fp32").one_picture().flops

    def test_the_miniature_is_the_sum_of_its_layers(self):
        with torch.device("meta"):
            work = WORK["p3"]("fp32")
            with torch.no_grad():
                layers = 20 * layer_flops(work.models, lambda: work.predict(1))
                layers += layer_flops(work.models, lambda: work.encode(1))
            picture = work.one_picture()
        assert picture.flops == layers

    def test_frozen_weights_get_no_gradients(self):
        with torch.device("meta"):
            work = WORK["p3"]("fp32")
            work.step().backward()
        trained = {id(parameter) for parameter in work.trained}
        with_gradient = {id(p) for model in work.models for p in model.parameters() if p.grad is not None}
        assert with_gradient <= trained
        assert len(with_gradient) > 50
        assert work.states == 16 * work.trained_count + 4 * work.frozen_count

    def test_they_are_what_the_programs_do_by_default(self):
        args = p1_train.parse_arguments([])
        sampling = p1_sample.parse_arguments(["out"])
        with torch.device("meta"):
            works = {key: WORK[key]("fp32") for key in MEASURED}
        assert p1_train.model_config(args) == works["p1"].models[0].config
        assert (works["p1"].batch, works["p1"].steps) == (args.batch_size, sampling.steps)
        assert sampling.guidance_scale != 1, "two passes"
        args = p2_train.parse_arguments([])
        assert p2_train.model_config(args) == OWN_FACES
        assert (works["p2"].batch, works["p2"].steps) == (args.batch_size, p2_sample.parse_arguments([]).steps)
        args = p3_train.parse_arguments([])
        assert (works["p3"].batch, works["p3"].steps) == (args.batch_size, p3_sample.parse_arguments([]).steps)
        shipped, _ = ControlNet.load(p3_sample.CONTROLNET)
        assert works["p3"].trained_count == sum(p.numel() for p in shipped.parameters())
        assert shipped.config.conditioning_embedding_out_channels == MINIATURE_HINT_CHANNELS

    @pytest.mark.slow
    def test_stable_diffusion_has_its_published_size(self):
        with torch.device("meta"):
            work = WORK["p3-sd"]("fp32")
        # The listed tensors of the original single file and of the original ControlNet.
        vae, text_encoder, unet, controlnet = (sum(p.numel() for p in model.parameters()) for model in work.models)
        assert (vae, text_encoder, unet) == (83_653_863, 123_060_480, 859_520_964)
        assert controlnet == work.trained_count == 361_279_120


class TestProjection:
    machine = Machine(fp32=10.0, bf16=100.0, bandwidth=8.0, memory=1.0, inside=4.0, between=2.0)
    assumed = Assumptions(utilisation=0.5, bandwidth_share=0.25, launch=3.0)

    def test_the_slowest_rules(self):
        counted = Count(flops=1000, bytes=40, kernels=2, peak=0)
        fp32 = {"arithmetic": 200.0, "traffic": 20.0, "launches": 6.0, "slowest": 200.0}
        assert projected(counted, self.machine, self.assumed, "fp32") == fp32
        bf16 = {"arithmetic": 20.0, "traffic": 10.0, "launches": 6.0, "slowest": 20.0}
        assert projected(counted, self.machine, self.assumed, "bf16") == bf16

    def test_exchange_is_a_ring_over_the_slowest_link(self):
        assert [exchange_seconds(64, gpus, self.machine) for gpus in (1, 8, 64)] == [0.0, 28.0, 63.0]

    def test_rates(self):
        step = Count(flops=64_000, bytes=0, kernels=2, peak=0)  # 1280 s, of which launches 6
        rates = training_rates(16, 64, step, self.machine, self.assumed, "bf16")
        assert rates[1] == {"grown": 16 / 1280, "shared": 16 / 1280, "exchange_share": 0.0}
        assert rates[8]["grown"] == 8 * 16 / (1280 + 28)
        assert rates[8]["shared"] == 16 / (160 + 28)
        assert rates[8]["exchange_share"] == 28 / 1308
        assert rates[64]["shared"] != rates[64]["shared"], "16 pictures are too few for 64"


class TestPage:
    def rows(self, keys, page: str) -> tuple[list[str], list[str]]:
        """Rows of these kinds of work that are counted now, and those on the page."""
        figures = {key: scale.figures_of(key, Machine(), Assumptions()) for key in keys}
        now = scale_tables.counted_text(figures, Machine(), Assumptions())
        names = tuple(f"| {f['name']} |" for f in figures.values())
        block = page.partition("<!-- counted -->")[2].partition("<!-- end of counted -->")[0]
        return tuple([line for line in text.splitlines() if line.startswith(names)] for text in (now, block))

    @pytest.mark.parametrize("keys", [("p1",), pytest.param(tuple(WORK), marks=pytest.mark.slow)])
    def test_the_page_holds_what_is_counted_now(self, keys):
        now, page = self.rows(keys, scale.PAGE.read_text(encoding="utf-8"))
        assert now == page
        assert len(now) >= 7 * len(keys)

    def test_only_the_blocks_are_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(scale, "WORK", {"p1": WORK["p1"]})
        page = tmp_path / "page.md"
        page.write_text("before\n<!-- counted -->\nold\n<!-- end of counted -->\nafter\n")
        args = scale.parse_arguments(
            ["--only", "p1", "--write", "--page", str(page), "--json", str(tmp_path / "a.json")]
        )
        result = scale.main(args)
        assert page.read_text().startswith("before\n<!-- counted -->\n### One training step\n")
        assert page.read_text().endswith("<!-- end of counted -->\nafter\n")
        assert "old" not in page.read_text()
        written = json.loads((tmp_path / "a.json").read_text())
        assert written["counted"]["p1"]["step"] == result["counted"]["p1"]["step"]

    def test_a_page_without_blocks_is_left_as_it_is(self, tmp_path, monkeypatch):
        monkeypatch.setattr(scale, "WORK", {"p1": WORK["p1"]})
        page = tmp_path / "page.md"
        page.write_text("mine\n<!-- counted -->\n")
        with pytest.raises(UserError, match=r"page.md: has no block from"):
            scale.main(scale.parse_arguments(["--only", "p1", "--write", "--page", str(page)]))
        assert page.read_text() == "mine\n<!-- counted -->\n"

    def test_part_of_the_work_cannot_be_written(self):
        with pytest.raises(UserError, match="leave --only or --write out"):
            scale.main(scale.parse_arguments(["--only", "p1", "--write"]))


def test_measuring_takes_the_steps_that_are_counted(monkeypatch, capsys):
    """A model of one layer: one step and a picture of three passes, each run once more than it is timed."""
    model = nn.Conv2d(1, 1, 1)
    calls = {"step": 0, "predict": 0, "encode": 0}

    def called(name, result):
        calls[name] += 1
        return result

    work = Work(
        "tiny", 2, lambda: called("step", model(torch.ones(2, 1, 4, 4)).sum()), 3, 1,
        lambda n: called("predict", model(torch.ones(n, 1, 4, 4))), lambda n: called("encode", None), [model],
        list(model.parameters()), 1,
    )  # fmt: skip
    before = model.weight.item()
    monkeypatch.setattr(scale, "WORK", {"p1": lambda precision: work})
    result = scale.measured("p1", "fp32", pictures=5, repeats=2)
    assert calls == {"step": 3, "predict": 9, "encode": 3}
    assert model.weight.item() != before
    assert result["pictures"] == 5
    figures = {"p1": {"name": "tiny", "step": asdict(Count(4_000_000_000, 0, 0, 0)),
                      "picture": asdict(Count(2_000_000_000, 0, 0, 0))}}  # fmt: skip
    text = scale_tables.measured_text({"p1": {"step": 2.0, "pictures": 5, "drawing": 10.0}}, figures, "facts")
    assert text.splitlines()[-1] == "| tiny | 2 | 2 | 2 | 1 |"
