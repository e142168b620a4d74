"""Vision-language models: assembly, joint sequences, loss on answers, states, checkpoints, and what is refused."""

import math

import pytest
import torch
from torch import nn

from zoo.data import Preprocessing
from zoo.engine import ModelCard, save_weights
from zoo.heads.vlm import collate
from zoo.vlm import create_vlm, list_vlms, load_state, load_vlm, load_vlm_checkpoint, save_state

transformers = pytest.importorskip("transformers", reason="needs transformers")

IMAGE = 66  # placeholder
SIZE, VOCABULARY = 32, 67


def language(kind: str = "mamba"):
    if kind == "mamba":
        return transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8)
    return transformers.BambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=16,
        max_position_embeddings=140,
    )


def vlm(kind: str = "mamba", **options):
    """A small model; weights are large enough that images make a difference."""
    torch.manual_seed(0)
    options = {"vision": "vim_micro", "connector": "mlp_connector", "language": language(kind), **options}
    model = create_vlm(**options, img_size=SIZE).eval()
    for parameter in [*model.connector.parameters(), *model.language_model.parameters()]:
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def text(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY - 1, (batch, length))


@pytest.fixture(scope="module")
def model():
    return vlm()


@pytest.fixture(scope="module")
def splicing():
    return vlm("bamba", image_token_id=IMAGE)


class TestAssembly:
    @pytest.mark.parametrize(
        "vision, layer, channels, tokens",
        [
            ("vim_micro", -2, 96, 64),
            ("vmamba_nano", -2, 128, 16),
            (["vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224"], 3, 384, None),
            (["vit_tiny_patch16_224", "vit_small_patch16_224"], -2, 576, 4),
        ],
    )
    def test_vision_models(self, vision, layer, channels, tokens):
        model = create_vlm(
            vision=vision, connector="linear_connector", language=language(), img_size=SIZE, vision_layer=layer
        )
        assert model.vision.num_features == channels == model.connector.proj.in_features
        if tokens is None:
            with pytest.raises(ValueError, match="grids 1 x 1, 2 x 2"):
                model.vision(torch.rand(1, 3, SIZE, SIZE))
            return
        features, grid = model.vision(torch.rand(2, 3, SIZE, SIZE))
        assert features.shape == (2, tokens, channels) and math.prod(grid) == tokens
        ids = text(2, 5)
        model(ids, labels=ids, images=torch.rand(2, 3, SIZE, SIZE)).loss.backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]

    def test_features_are_those_of_the_layer(self):
        import timm

        tower = timm.create_model("vit_tiny_patch16_224", img_size=SIZE)
        whole = timm.create_model("vit_tiny_patch16_224", img_size=SIZE)
        whole.load_state_dict(tower.state_dict())
        model = create_vlm(vision=tower.eval(), connector="linear_connector", language=language())
        images = torch.rand(1, 3, SIZE, SIZE)
        (expected,) = whole.eval().get_intermediate_layers((images - 0.5) / 0.5, n=[10])
        torch.testing.assert_close(model.vision(images)[0], expected)
        assert len(tower.blocks) == 11

    def test_published_models(self):
        assert list_vlms() == ["cobra_3b", "cobra_ldpnet_3b", "cobra_siglip_3b", "mlmamba_3b", "vl_mamba_3b"]
        model = create_vlm("cobra_3b", device="meta")
        features, grid = model.vision(torch.rand(1, 3, 384, 384, device="meta"))
        assert features.shape == (1, 729, 2176) and grid == (27, 27)
        assert model.connector(features, grid).shape == (1, 729, 2560)
        small = create_vlm("mlmamba_3b", vision="vim_micro", language=language(), connector_args=dict(head_dim=8))
        assert small.connector.proj[0].in_features == 96 and small.connector.norm.normalized_shape == (32,)

    @pytest.mark.parametrize("name", ["cobra_siglip_3b", "cobra_ldpnet_3b", "vl_mamba_3b"])
    def test_published_models_without_encoder(self, name):
        model = create_vlm(name, vision=(), device="meta", dtype=torch.bfloat16)
        channels = 2176 if name == "cobra_ldpnet_3b" else 1152
        tokens = model.connector(torch.empty(1, 729, channels, device="meta", dtype=torch.bfloat16), None)
        assert tokens.shape == (1, 196 if name == "cobra_ldpnet_3b" else 729, 2560)
        assert model.language_model.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        "options, message",
        [
            (dict(name="cobra_4b"), "no vision-language model 'cobra_4b'; did you mean cobra_3b"),
            (dict(vision="vim_micro"), "give connector, language too"),
            (dict(vision="vim_micro", connector="mlp", language=language()), "no connector 'mlp'; there are fused_mlp"),
            (dict(vision=(), connector="mlp_connector", language=language()), "vision_channels has to say"),
            (dict(vision="vim_mikro", connector="mlp_connector", language=language()), "did you mean vim_micro"),
            (
                dict(vision="vim_micro", connector="mlp_connector", language=language(), vision_layer=99),
                "layer=99: .* layers to take features from",
            ),
            (
                dict(vision=(), connector=nn.Identity(), language=language(), connector_args=dict(depth=1)),
                "connectors given by name",
            ),
        ],
    )
    def test_parts_that_are_missing_or_not_known(self, options, message):
        with pytest.raises(ValueError, match=message):
            create_vlm(**options)


class TestForward:
    def test_loss_is_on_answers_only(self, model):
        ids, images = text(2, 6), torch.rand(2, 3, SIZE, SIZE)
        labels = ids.clone()
        labels[0, :4] = labels[1, :3] = -100
        output = model(ids, labels=labels, images=images, all_logits=True)
        assert output.logits.shape == (2, 64 + 6, VOCABULARY)
        log_probabilities = output.logits.log_softmax(dim=-1)
        answers = [(row, position) for row in (0, 1) for position in range(6) if labels[row, position] != -100]
        expected = [-log_probabilities[row, 64 + position - 1, ids[row, position]] for row, position in answers]
        torch.testing.assert_close(output.loss, torch.stack(expected).mean())
        few = model(ids, labels=labels, images=images)
        assert few.columns.tolist() == [66, 67, 68]
        torch.testing.assert_close(few.logits, output.logits[:, few.columns])
        torch.testing.assert_close(few.loss, output.loss)

    def test_without_answers_the_loss_is_zero(self, model):
        ids = text(1, 4)
        output = model(ids, labels=torch.full_like(ids, -100), images=torch.rand(1, 3, SIZE, SIZE))
        assert output.loss.item() == 0

    def test_padding_and_other_rows_change_nothing(self, splicing):
        """Rows of different lengths, with two images, one and none, against each row alone."""
        rows = [text(1, 7)[0], text(1, 4)[0], text(1, 5)[0]]
        rows[0][[1, 4]] = rows[1][2] = IMAGE
        images = torch.rand(3, 3, SIZE, SIZE)
        examples = [{"input_ids": row, "labels": torch.where(row == IMAGE, -100, row)} for row in rows]
        taken = [images[:2], images[2:], None]
        alone = [
            splicing(row[None], labels=example["labels"][None], images=some, all_logits=True)
            for row, example, some in zip(rows, examples, taken, strict=True)
        ]
        for side in ("left", "right"):
            output = splicing(**collate(examples, 0, side), images=images, all_logits=True)
            for row, expected in zip(output.logits, alone, strict=True):
                torch.testing.assert_close(row[: expected.logits.shape[1]], expected.logits[0], rtol=1e-4, atol=1e-4)
            counts = [(one.labels[:, 1:] != -100).sum() for one in alone]
            mean = sum(one.loss * count for one, count in zip(alone, counts, strict=True)) / sum(counts)
            torch.testing.assert_close(output.loss, mean, rtol=1e-4, atol=1e-5)

    def test_images_count(self, model):
        ids = text(1, 5)
        first, second = (model(ids, images=torch.full((1, 3, SIZE, SIZE), value)).logits for value in (0.0, 1.0))
        assert (first - second)[:, -1].abs().max() > 1e-3

    def test_features_instead_of_images(self, model):
        ids, images = text(1, 5), torch.rand(1, 3, SIZE, SIZE)
        features, grid = model.vision(images)
        expected = model(ids, images=images).logits
        torch.testing.assert_close(model(ids, image_features=features, grid=grid).logits, expected)
        with pytest.raises(ValueError, match="two sources of the same"):
            model(ids, images=images, image_features=features)
        blind = create_vlm(vision=(), vision_channels=96, connector=model.connector, language=model.language_model)
        torch.testing.assert_close(blind(ids, image_features=features).logits, expected)
        with pytest.raises(ValueError, match="no vision encoder"):
            blind(ids, images=images)

    def test_placeholders_outside_the_vocabulary(self, model):
        other = create_vlm(vision=(), connector=model.connector, language=model.language_model, image_token_id=-200)
        ids, features = text(1, 4), torch.randn(1, 64, 96)
        expected = model(ids, image_features=features).logits
        given = other(torch.cat([torch.tensor([[-200]]), ids], dim=1), image_features=features).logits
        torch.testing.assert_close(given, expected)

    def test_sequences_beyond_the_limit(self, splicing):
        ids = text(1, 80)
        ids[0, 0] = IMAGE
        with pytest.raises(ValueError, match=r"143 tokens exceed the 140 of this BambaForCausalLM"):
            splicing(ids, images=torch.rand(1, 3, SIZE, SIZE))

    def test_bfloat16_autocast(self, model):
        ids, images = text(1, 5), torch.rand(1, 3, SIZE, SIZE)
        expected = model(ids, labels=ids, images=images).loss
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(ids, labels=ids, images=images).loss - expected).abs() < 0.05 * expected


class TestTraining:
    def test_parts_are_frozen(self):
        model = vlm()
        model.freeze("vision", "language_model")
        model.train()
        assert not model.vision.training and not model.language_model.training and model.connector.training
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = torch.optim.AdamW(model.parameter_groups(1e-2))
        ids = text(2, 5)
        model(ids, labels=ids, images=torch.rand(2, 3, SIZE, SIZE)).loss.backward()
        optimizer.step()
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == {name for name in before if name.startswith("connector.")}
        model.freeze()
        assert model.vision.training and all(parameter.requires_grad for parameter in model.parameters())
        with pytest.raises(ValueError, match="no part decoder; there are vision, connector, language_model"):
            model.freeze("decoder")

    def test_parameter_groups(self, model):
        groups = model.parameter_groups(dict(vision=1e-5, connector=1e-3, language_model=2e-5), weight_decay=0.1)
        grouped = [id(parameter) for group in groups for parameter in group["params"]]
        assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in model.parameters()}
        assert {(group["name"], group["lr"]) for group in groups} == {
            ("vision", 1e-5),
            ("connector", 1e-3),
            ("language_model", 2e-5),
        }
        undecayed = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
        assert undecayed == {id(p) for n, p in model.named_parameters() if n in model.no_weight_decay()}
        assert "language_model.backbone.layers.0.mixer.A_log" in model.no_weight_decay()
        assert "language_model.backbone.layers.0.mixer.in_proj.weight" not in model.no_weight_decay()
        with pytest.raises(ValueError, match="lr has no entry for the part language_model"):
            model.parameter_groups(dict(vision=1e-5, connector=1e-3))

    def test_it_learns_what_is_in_the_image(self):
        """Dark or bright images, the same question: the answer can come from the image alone."""
        model = vlm().train()
        model.freeze("vision")
        optimizer = torch.optim.AdamW(model.parameter_groups(3e-3))
        images = torch.tensor([0.1, 0.9])[:, None, None, None].expand(2, 3, SIZE, SIZE)
        ids = torch.tensor([[1, 2, 3, 10], [1, 2, 3, 20]])
        labels = torch.tensor([[-100, -100, -100, 10], [-100, -100, -100, 20]])
        for _ in range(25):
            loss = model(ids, labels=labels, images=images).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        answers = model.generate(ids[:, :3], images=images, max_new_tokens=1)
        assert answers.tolist() == [[10], [20]]

    def test_gradient_checkpointing(self):
        model = vlm().train()
        ids, images = text(1, 4), torch.rand(1, 3, SIZE, SIZE)
        losses = []
        for enable in (True, False):
            model.set_grad_checkpointing(enable)
            assert model.language_model.is_gradient_checkpointing == enable
            losses.append(model(ids, labels=ids, images=images).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses)


class TestGeneration:
    @pytest.mark.parametrize("kind", ["mamba", "bamba"])
    def test_is_full_recomputation(self, kind):
        model = vlm(kind)
        rows, images = [text(1, 6)[0], text(1, 3)[0]], torch.rand(2, 3, SIZE, SIZE)
        prompts = collate([{"input_ids": row} for row in rows], 0, "left")
        tokens = model.generate(**prompts, images=images, max_new_tokens=5, stop_tokens=())
        for row, image, given in zip(rows, images, tokens, strict=True):
            for _ in range(5):
                logits = model(row[None], images=image[None]).logits
                row = torch.cat([row, logits[0, -1:].argmax(dim=-1)])
            assert torch.equal(given, row[-5:])

    @pytest.mark.parametrize("fixture", ["model", "splicing"])
    def test_many_questions_about_an_image_that_is_read_once(self, fixture, request, monkeypatch):
        model = request.getfixturevalue(fixture)
        image = torch.rand(1, 3, SIZE, SIZE)
        prefix = torch.tensor([[IMAGE, 5, 6]]) if model.image_token_id is not None else torch.tensor([[5, 6]])
        questions = [text(1, 4), text(1, 2)]
        expected = [
            model.generate(torch.cat([prefix, each], dim=1), images=image, max_new_tokens=4, stop_tokens=())
            for each in questions
        ]
        state = model.prefill(prefix, images=image)
        monkeypatch.setattr(model.vision, "forward", None)  # no image is encoded from here on
        for question, answer in zip(questions, expected, strict=True):
            assert torch.equal(model.generate(question, state=state.copy(), max_new_tokens=4, stop_tokens=()), answer)
        both = collate([{"input_ids": each[0]} for each in questions], 0, "left")  # in one batch
        answers = model.generate(**both, state=state.repeat(2), max_new_tokens=4, stop_tokens=())
        assert torch.equal(answers, torch.cat(expected))

    def test_a_state_goes_to_a_file(self, model, tmp_path):
        state = model.prefill(text(1, 3), images=torch.rand(1, 3, SIZE, SIZE))
        save_state(state, tmp_path / "image.safetensors")
        loaded = load_state(tmp_path / "image.safetensors", model.language_model.config)
        question = text(1, 3)
        given = model.generate(question, state=loaded, max_new_tokens=4, stop_tokens=())
        assert torch.equal(given, model.generate(question, state=state, max_new_tokens=4, stop_tokens=()))

    def test_tokens_are_streamed(self, model):
        ids, images = text(2, 3), torch.rand(2, 3, SIZE, SIZE)
        stream = model.stream(model.prefill(ids, images=images), 4, stop_tokens=())
        first = next(stream)
        assert first.shape == (2,)
        expected = model.generate(ids, images=images, max_new_tokens=4, stop_tokens=())
        assert torch.equal(torch.stack([first, *stream], dim=1), expected)

    def test_nothing_to_go_on_from(self, model):
        with pytest.raises(ValueError, match="give input_ids or a state"):
            model.generate()

    def test_more_images_than_placeholders(self, splicing):
        ids = torch.tensor([[IMAGE, 4]])
        with pytest.raises(ValueError, match="2 images do not match 1 image placeholders"):
            splicing.generate(ids, images=torch.rand(2, 3, SIZE, SIZE))
        with pytest.raises(ValueError, match="no image placeholder"):
            splicing.generate(ids[:, 1:], images=torch.rand(1, 3, SIZE, SIZE))

    def test_prompts_beyond_the_limit(self, splicing):
        ids = text(1, 70)
        ids[0, 0] = IMAGE
        image = torch.rand(1, 3, SIZE, SIZE)
        with pytest.raises(ValueError, match="133 tokens and max_new_tokens=8 exceed the 140"):
            splicing.generate(ids, images=image, max_new_tokens=8)


class TestCheckpoints:
    def test_output_layer_is_stored_once(self, model):
        assert not [name for name in model.state_dict() if "lm_head" in name]
        other = vlm()
        other.load_state_dict(model.state_dict())
        assert other.language_model.lm_head.weight is other.language_model.backbone.embeddings.weight
        other.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
        assert other.language_model.lm_head.weight is other.language_model.backbone.embeddings.weight
        ids = text(1, 4)
        assert torch.equal(other(ids).logits, model(ids).logits)

    def test_our_files(self, model, tmp_path):
        from zoo.weights import save_weights

        path = tmp_path / "model.safetensors"
        save_weights(model.state_dict(), path)
        other = create_vlm(
            vision="vim_micro",
            connector="mlp_connector",
            language=language(),
            img_size=SIZE,
            checkpoint_path=path,
        )
        ids, images = text(1, 4), torch.rand(1, 3, SIZE, SIZE)
        assert torch.equal(other.eval()(ids, images=images).logits, model(ids, images=images).logits)

    def released(self, model, prefix: str) -> dict:
        """A file of sections as the authors write it, of a model with a two-layer connector."""
        language_model = {
            f"{prefix}{name}".replace("embeddings", "embedding"): tensor
            for name, tensor in model.language_model.state_dict().items()
        }
        connector = {
            name.replace("layers.", "projector."): tensor for name, tensor in model.connector.state_dict().items()
        }
        return {"model": {"projector": connector, "llm_backbone": language_model}, "optimizer": {"step": 3}}

    @pytest.mark.parametrize("prefix", ["llm.", ""])
    def test_released_files(self, model, tmp_path, prefix):
        path = tmp_path / "latest-checkpoint.pt"
        torch.save(self.released(model, prefix), path)
        other = create_vlm(
            vision="vim_micro",
            connector="mlp_connector",
            language=language(),
            img_size=SIZE,
            checkpoint_path=path,
        )
        other.vision.load_state_dict(model.vision.state_dict())  # not in the file
        ids, images = text(1, 4), torch.rand(1, 3, SIZE, SIZE)
        assert torch.equal(other.eval()(ids, images=images).logits, model(ids, images=images).logits)

    def test_files_that_do_not_fit(self, model, tmp_path):
        content = self.released(model, "llm.")
        del content["model"]["projector"]["projector.2.bias"]
        torch.save(content, tmp_path / "broken.pt")
        with pytest.raises(ValueError, match=r"missing connector\.layers\.2\.bias"):
            create_vlm(
                vision="vim_micro",
                connector="mlp_connector",
                language=language(),
                img_size=SIZE,
                checkpoint_path=tmp_path / "broken.pt",
            )
        torch.save({"model": {"step": 3}}, tmp_path / "empty.pt")
        with pytest.raises(ValueError, match="holds no weights"):
            load_vlm_checkpoint(tmp_path / "empty.pt")
        (tmp_path / "damaged.pt").write_bytes(b"nothing")
        with pytest.raises(ValueError, match="damaged"):
            load_vlm_checkpoint(tmp_path / "damaged.pt")
        with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
            load_vlm_checkpoint(tmp_path / "missing.pt")

    def test_weights_of_another_task(self, tmp_path):
        card = ModelCard("vim_micro", {}, ("a",), Preprocessing((8, 8), 1, (0.0,), (1.0,)), data="digits")
        save_weights(tmp_path / "x.safetensors", {"weight": torch.zeros(1)}, card)
        with pytest.raises(ValueError, match="was trained for classification"):
            load_vlm(tmp_path / "x.safetensors")
