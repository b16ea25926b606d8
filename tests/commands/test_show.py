"""experiments/show.py, as a user types it."""

import re

import pytest

import flaxnets
from flaxnets.cli.main import run_command
from flaxnets.models import published_image_shape
from flaxnets.models.cost import count_cost, list_modules
from flaxnets.reporting.architecture_figures import find_blocks


def run(show, capsys, *arguments):
    status = run_command(show.main, list(arguments))
    return status, *capsys.readouterr()


def test_layers_of_a_network(show, capsys):
    status, out, _ = run(show, capsys, "cifar_resnet8")
    assert status == 0
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert ["conv1", "3x3 conv, 16", "32x32x16", "432", "442,368"] in rows
    assert ["stage2_block1/conv1", "3x3 conv, 32, /2", "16x16x32", "4,608", "1,179,648"] in rows
    assert ["stage2_block1/bn2", "batch norm", "16x16x32", "64"] in rows
    assert ["head", "dense, 10", "10", "650", "640"] in rows
    cost = count_cost(flaxnets.create_model("cifar_resnet8"), (32, 32, 3), 10)
    assert rows[-2] == ["total", f"{cost.parameters:,}", f"{cost.multiply_adds:,}"]
    assert cost == (75_290, 12_239_488)


def test_image_and_classes_are_those_asked_for(show, capsys):
    status, out, _ = run(show, capsys, "vgg11", "--input", "64x32x1", "--classes", "7")
    assert status == 0
    assert "vgg11, 64x32x1" in out
    assert "64x32x64" in out
    assert "dense, 7" in out


def test_all_networks(show, capsys):
    status, out, _ = run(show, capsys)
    assert status == 0
    for name in flaxnets.list_models():
        assert f"  {name} " in out
    assert re.search(r"cifar_resnet1202 +32x32x3 +19,421,274 +2,829,238,912", out)
    assert re.search(r"cifar_resnet1001v2 +32x32x3 +10,327,706 +1,487,849,984", out)


@pytest.mark.parametrize("name", ["cifar_resnet26", "resnet50v2", "cnn"])
def test_costs_of_the_list_are_those_of_all_layers(show, name):
    model = flaxnets.create_model(name)
    shape = published_image_shape(name)
    assert show.sum_costs(show.all_layers(model, shape)) == count_cost(
        model, shape, model.num_classes
    )


def blocks_of(name, **overrides):
    model = flaxnets.create_model(name, **overrides)
    shape = published_image_shape(name)
    return find_blocks(list_modules(model, shape), getattr(model, "residual", False))


def test_blocks_and_their_shortcuts():
    blocks = blocks_of("resnet34")
    assert [block.boxes for block in blocks[:2]] == [
        (("7x7 conv, 64, /2", "112x112"),),
        (("pool, /2", "56x56"),),
    ]
    shortcuts = [block.shortcut for block in blocks[2:-2]]
    identity, projection = "identity", "projection"
    stages = [[identity] * 3]
    stages += [[projection] + [identity] * (n - 1) for n in (4, 6, 3)]
    assert shortcuts == [shortcut for stage in stages for shortcut in stage]
    assert blocks[3].boxes == (("3x3 conv, 64", "56x56"), ("3x3 conv, 64", "56x56"))
    assert [block.boxes[0][0] for block in blocks[-2:]] == ["global average pool", "dense, 1000"]
    # Zero padding, too, is drawn dashed where the shape changes, as in the paper.
    assert [b.shortcut for b in blocks_of("resnet34", shortcut="A")[2:-2]] == shortcuts
    assert {b.shortcut for b in blocks_of("resnet18", shortcut="C")[2:-2]} == {projection}
    assert {b.shortcut for b in blocks_of("plain34")} == {None}


def test_pooling_is_where_it_is():
    def texts(name):
        return [text for block in blocks_of(name) for text, _ in block.boxes]

    assert texts("cnn") == [
        "3x3 conv, 64",
        "pool, /2",
        "3x3 conv, 64",
        "pool, /2",
        "3x3 conv, 64",
        "dense, 10",
    ]
    assert texts("ynet")[-3:] == ["3x3 conv, 128", "pool, /2", "dense, 10"]
    assert texts("alexnet")[-5:] == ["3x3 conv, 256", "pool", *["dense, 4096"] * 2, "dense, 1000"]
    assert [len(block.boxes) for block in blocks_of("vgg_residual")] == [3, 3, 3, 3, 1, 1, 1, 1]


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_figure(show, capsys, tmp_path, suffix):
    figure = tmp_path / f"out.{suffix}"
    arguments = ["cifar_resnet8", "--compare", "ynet", "--figure", str(figure)]
    status, out, _ = run(show, capsys, *arguments)
    assert status == 0
    assert f"figure: {figure}" in out
    assert figure.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet35"], "18, 34, 50, 101, 152"),
        (["resnt34"], "did you mean resnet34?"),
        (["resnet34", "--compare", "plan34"], "did you mean plain34?"),
        (["resnet34", "--input", "224"], "height x width x channels"),
        (["resnet34", "--input", "0x1x1"], "height x width x channels"),
        (["resnet34", "--classes", "0"], "above 0"),
        (["resnet34", "--figure", "f.jpg"], ".svg, .png, .pdf"),
        (["resnet34", "--figure", "/none/f.svg"], "no directory /none"),
        (["resnet34", "--input", "50000000000x50000000000x3"], "each at most 10000"),
        (["resnet34", "--classes", "99999999999999999999"], "at most 100000000"),
        (["vgg16", "--input", "8x8x3"], "8x8 pixels are too small"),
        (["--figure", "f.svg"], "name a network"),
        (["vgg11", "--input", "16x16x3"], "16x16 pixels are too small"),
    ],
)
def test_mistakes_are_one_line(show, capsys, arguments, message):
    status, out, err = run(show, capsys, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not out
