"""Base models, tokenizers, reward models, the critic and scoring."""

from __future__ import annotations

import json
import os
from itertools import pairwise

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from rlhf.config import ArchitectureConfig, BaseModelConfig, LoraConfig, RuntimeConfig
from rlhf.data.chat_template import PLAIN_TEMPLATE
from rlhf.data.rendering import ASSISTANT, END, PAD, Renderer, load_renderer
from rlhf.errors import ConfigError, TrainingError
from rlhf.modeling.base import from_scratch, load_base, load_policy, train_tokenizer
from rlhf.modeling.critic import Critic, critic_from, freeze
from rlhf.modeling.device import prepare_device
from rlhf.modeling.lora import lora_config, merge_adapter
from rlhf.modeling.reward import (
    Scorer,
    counted_tokens,
    load_reward_model,
    pad_right,
    pool,
    reward_meta,
    save_reward_model,
)
from tests.library import toys
from tests.library.toys import DEVICE, within

pytestmark = pytest.mark.device


def ids_of(*rows):
    return torch.tensor(rows, device=DEVICE)


def same(a, b) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class TestFromScratch:
    def test_seeded(self):
        torch.manual_seed(99)
        a, tokenizer = from_scratch(toys.ARCHITECTURE, ["good bad"], 1)
        b, again = from_scratch(toys.ARCHITECTURE, ["good bad"], 1)
        c, _ = from_scratch(toys.ARCHITECTURE, ["good bad"], 2)
        assert same(a, b)
        assert tokenizer.get_vocab() == again.get_vocab()
        assert not same(a, c)

    def test_architecture(self):
        shape = ArchitectureConfig(
            hidden_size=24, layers=2, heads=3, intermediate_size=40, vocab_size=300, context=50
        )
        model, tokenizer = from_scratch(shape, ["good bad"], 1)
        got = model.config
        assert (got.hidden_size, got.num_hidden_layers, got.num_attention_heads) == (24, 2, 3)
        assert (got.intermediate_size, got.max_position_embeddings) == (40, 50)
        assert got.vocab_size == len(tokenizer) <= 300
        assert got.tie_word_embeddings
        assert got.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
        assert got.eos_token_id == tokenizer.eos_token_id

    def test_vocabulary_is_bounded(self):
        words = [f"word{i} other{i * 7} thing{i * 13}" for i in range(400)]
        assert len(train_tokenizer(words, 320)) == 320

    def test_tokenizer_survives_saving(self, tmp_path):
        tokenizer = train_tokenizer(["good bad tea"] * 5, 300)
        tokenizer.save_pretrained(tmp_path)
        loaded = load_renderer(tmp_path)
        assert loaded.template_hash == Renderer(tokenizer).template_hash
        text = "good bad? <|end|> naïve 🙂"
        assert loaded.encode("p", text, 99) == Renderer(tokenizer).encode("p", text, 99)


class TestLoadBase:
    def load(self, folder):
        return load_base(BaseModelConfig(path=str(folder)), [], 0)

    def test_none_is_from_scratch(self):
        model, tokenizer = load_base(toys.BASE, ["good bad"], 4)
        expected, _ = from_scratch(toys.ARCHITECTURE, ["good bad"], 4)
        assert same(model, expected)
        assert tokenizer.chat_template

    def test_a_complete_folder_is_taken_as_it_is(self, fresh):
        model, tokenizer = self.load(fresh)
        assert same(model, load_policy(fresh))
        assert Renderer(tokenizer).template_hash == load_renderer(fresh).template_hash

    def bare(self, fresh, copy_of, **special):
        """The same model with another set of special tokens."""
        folder = copy_of(fresh)
        tokenizer = AutoTokenizer.from_pretrained(fresh)
        for name, value in special.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").unlink()
        return folder

    @pytest.mark.parametrize("pad", [None, "<|end|>"])
    def test_pad_and_template_are_added(self, fresh, copy_of, pad):
        _, tokenizer = self.load(self.bare(fresh, copy_of, pad_token=pad))
        assert tokenizer.chat_template == PLAIN_TEMPLATE
        assert tokenizer.pad_token == PAD
        assert tokenizer.pad_token_id != tokenizer.eos_token_id

    def test_no_end_of_text(self, fresh, copy_of):
        folder = self.bare(fresh, copy_of, eos_token=None)
        _, tokenizer = self.load(folder)
        assert tokenizer.eos_token == END  # that of the model's configuration
        for name in ("config.json", "generation_config.json"):
            values = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**values, "eos_token_id": None}))
        with pytest.raises(ConfigError, match=r"model .*no eos_token.*set one in"):
            self.load(folder)

    @pytest.mark.parametrize("name", ["/no/such/folder", "no-such-folder"])
    def test_missing_folder(self, name, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ConfigError, match=rf"base\.path = .{name}.: no .*give a"):
            self.load(name)

    def test_pickled_weights_are_not_read(self, fresh, copy_of):
        folder = copy_of(fresh)
        torch.save(toys.weights(fresh), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ConfigError, match=r"weights are a pickle \(pytorch"):
            self.load(folder)

    def test_half_precision_is_loaded_in_full(self, fresh, copy_of):
        folder = copy_of(fresh)
        load_policy(fresh).to(torch.bfloat16).save_pretrained(folder)
        model, _ = self.load(folder)
        assert model.dtype == torch.float32


def _foreign_tokenizer():
    """One without pad token and template, like GPT-2's."""
    tokenizer = train_tokenizer(["good bad"], 300)
    vocabulary = tokenizer.backend_tokenizer.to_str()
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    small = json.loads(vocabulary)
    small["added_tokens"] = [t for t in small["added_tokens"] if t["content"] != PAD]
    ids = {t: i for i, t in enumerate(k for k in small["model"]["vocab"] if k != PAD)}
    small["model"]["vocab"] = ids
    for token in small["added_tokens"]:
        token["id"] = ids[token["content"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(small)), eos_token="<|end|>"
    )


def test_device():
    threads = torch.get_num_threads()
    assert prepare_device(RuntimeConfig(device="cpu", threads=3)) == torch.device("cpu")
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    assert prepare_device(RuntimeConfig(threads=threads)).type in ("cpu", "cuda", "mps")
    found = torch.accelerator.current_accelerator(check_available=True)
    absent = "mps" if found and found.type == "cuda" else "cuda"
    with pytest.raises(ConfigError, match=f"runtime.device = '{absent}', but torch finds no such"):
        prepare_device(RuntimeConfig(device=absent, threads=threads))


class TestPooling:
    scores = torch.tensor([[1.0, 2.0, 4.0, 8.0], [3.0, 5.0, 7.0, 9.0]], device=DEVICE)
    mask = ids_of([1, 1, 1, 1], [1, 1, 1, 0])

    def test_last(self):
        # the last token that is not padding: 8 and 7
        assert pool(self.scores, self.mask.bool(), "last").tolist() == [8, 7]

    def test_sum(self):
        # 1+2+4+8 and 3+5+7
        assert pool(self.scores, self.mask.bool(), "sum").tolist() == [15, 15]

    def test_only_what_follows_the_last_marker(self):
        ids = ids_of([77, 5, 77, 5], [5, 5, 77, 5])
        counted = counted_tokens(ids, self.mask, 77)
        # first row: a past turn of the assistant; second row: what follows is padding
        assert counted.int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
        assert pool(self.scores, counted, "sum").tolist() == [8, 0]

    def test_all_without_a_marker(self):
        ids = ids_of([5, 5, 5, 5], [5, 5, 5, 77])
        assert counted_tokens(ids, self.mask, None).int().tolist() == self.mask.tolist()
        assert counted_tokens(ids, self.mask, 77).int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


class TestRewardModel:
    def test_begins_at_zero_from_a_language_model(self, fresh, renderer):
        model = load_reward_model(fresh, renderer)
        assert model.score.weight.abs().sum() == 0
        assert (model.pooling, model.marker) == ("last", None)
        backbone = load_policy(fresh).model
        assert same(model.model, backbone)

    @pytest.mark.parametrize("pooling", ["last", "sum"])
    def test_survives_saving(self, fresh, renderer, tmp_path, pooling):
        model = load_reward_model(fresh, renderer, pooling).to(DEVICE)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.score.weight)
        save_reward_model(model, renderer, tmp_path)
        loaded = load_reward_model(tmp_path, load_renderer(tmp_path)).to(DEVICE)
        assert loaded.pooling == pooling
        assert loaded.marker == (
            renderer.tokenizer.convert_tokens_to_ids(ASSISTANT) if pooling == "sum" else None
        )
        rows = [renderer.encode("tea?", r, 40).ids for r in ("good", "b")]
        ids, mask = (t.to(DEVICE) for t in pad_right(rows, 0))
        assert torch.equal(model.eval()(ids, mask).logits, loaded.eval()(ids, mask).logits)
        assert reward_meta(tmp_path) == {
            "pooling": pooling,
            "template_hash": renderer.template_hash,
        }

    def test_last_pooling_is_what_transformers_computes(self, fresh, renderer, tmp_path):
        model = load_reward_model(fresh, renderer, "last").to(DEVICE)
        torch.nn.init.normal_(model.score.weight)
        save_reward_model(model, renderer, tmp_path)
        standard = AutoModelForSequenceClassification.from_pretrained(tmp_path).to(DEVICE)
        assert type(standard) is LlamaForSequenceClassification
        rows = [renderer.encode("tea?", r, 40).ids for r in ("good", "b")]
        ids, mask = (t.to(DEVICE) for t in pad_right(rows, renderer.tokenizer.pad_token_id))
        torch.testing.assert_close(
            standard(ids, attention_mask=mask).logits,
            model(ids, mask).logits,
            atol=within(1e-5, 1e-4),
            rtol=within(1.3e-6, 1e-4),
        )

    def test_a_foreign_model_has_no_meta(self, fresh):
        assert reward_meta(fresh) == {}
        assert reward_meta("some/hub-id") == {}

    def test_two_labels_are_refused(self, fresh, renderer, tmp_path):
        config = LlamaConfig.from_pretrained(fresh, num_labels=2)
        LlamaForSequenceClassification(config).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"has 2 labels; .*exactly one"):
            load_reward_model(tmp_path, renderer)

    def test_an_architecture_without_classifier_is_refused(self, renderer, tmp_path):
        config = {"model_type": "vits", "architectures": ["VitsModel"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=r"a language model for 'vits'; start from"):
            load_reward_model(tmp_path, renderer)

    def test_padding_is_found_by_the_mask_not_by_the_id(self, fresh, renderer):
        model = load_reward_model(fresh, renderer, "last").eval().to(DEVICE)
        torch.nn.init.normal_(model.score.weight)
        pad = renderer.tokenizer.pad_token_id
        ids = ids_of([5, 6, pad])
        with_pad = model(ids, torch.ones_like(ids)).logits
        without = model(ids, ids_of([1, 1, 0])).logits
        assert not torch.equal(with_pad, without)
        left = model(ids_of([9, 5, 6]), ids_of([0, 1, 1])).logits
        torch.testing.assert_close(left, without, atol=within(1e-5, 1e-4), rtol=0)


def test_absolute_positions_begin_at_the_first_real_token(tmp_path):
    tokenizer = _foreign_tokenizer()
    tokenizer.add_special_tokens({"pad_token": PAD})
    shape = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=32)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path)
    model = load_reward_model(tmp_path, Renderer(tokenizer), "last").eval().to(DEVICE)
    torch.nn.init.normal_(model.score.weight)
    alone = model(ids_of([5, 6]), ids_of([1, 1])).logits
    padded = model(ids_of([9, 9, 5, 6]), ids_of([0, 0, 1, 1])).logits
    torch.testing.assert_close(padded, alone, atol=within(1e-5, 1e-4), rtol=0)


class TestScorer:
    prompts = ["tea or cup?", "jar?", "pot or mug?", "jar?"]
    replies = ["good", "bad bad", "a much longer reply than that", "good good"]

    def test_order_and_batches_change_nothing(self, reward_model):
        scores = Scorer(reward_model, DEVICE, 48)(self.prompts, self.replies)
        one_by_one = Scorer(reward_model, DEVICE, 48, batch_tokens=1)(self.prompts, self.replies)
        close = within(1e-5, 1e-4)
        torch.testing.assert_close(scores, one_by_one, atol=close, rtol=0)
        backwards = Scorer(reward_model, DEVICE, 48, batch_tokens=30)(
            self.prompts[::-1], self.replies[::-1]
        )
        torch.testing.assert_close(scores, backwards.flip(0), atol=close, rtol=0)
        assert all(abs(a - b) > 1e-3 for a, b in pairwise(sorted(scores.tolist())))

    def test_a_reply_is_scored_with_its_own_prompt(self, reward_model):
        scorer = Scorer(reward_model, DEVICE, 48)
        a, b = scorer(["tea or cup?", "jar jar jar!"], ["good", "good"])
        assert a != b
        with pytest.raises(ValueError, match="longer"):
            scorer(["tea?"], ["good", "bad"])

    def test_it_learns_nothing(self, reward_model):
        scorer = Scorer(reward_model, DEVICE, 48)
        assert not any(p.requires_grad for p in scorer.model.parameters())
        assert not scorer.model.training

    def test_a_score_that_is_not_finite_names_the_reply(self, reward_model):
        scorer = Scorer(reward_model, DEVICE, 48)
        scorer.model.score.weight[0, 0] = float("nan")
        with pytest.raises(
            TrainingError, match=r"not finite for the reply 'good'; .*learning_rate"
        ):
            scorer(["tea?"], ["good"])

    def test_long_rows_are_cut(self, reward_model):
        scorer = Scorer(reward_model, DEVICE, 20)
        assert torch.equal(scorer(["?"], ["x" * 90]), scorer(["?"], ["x" * 60]))


class TestCritic:
    def test_begins_at_zero_and_keeps_the_backbone(self, fresh, reward_model, renderer):
        policy = load_policy(fresh)
        ids = ids_of([5, 6, 7], [8, 9, 5])
        mask = torch.ones_like(ids)
        for model in (policy, load_reward_model(reward_model, load_renderer(reward_model))):
            critic = critic_from(model).to(DEVICE)
            values = critic(ids, attention_mask=mask)
            assert values.shape == (2, 3)
            assert values.abs().sum() == 0
            assert critic.backbone is model.model

    def test_values_are_the_head_on_every_position(self, policy):
        critic = Critic(policy.model)
        torch.nn.init.ones_(critic.value_head.weight)
        torch.nn.init.constant_(critic.value_head.bias, 0.5)
        critic.to(DEVICE)
        ids = ids_of([5, 6, 7])
        mask = torch.ones_like(ids)
        hidden = policy.model(input_ids=ids).last_hidden_state
        # a head of ones sums the features
        expected = hidden.sum(-1) + 0.5
        values = critic(ids, attention_mask=mask)
        close = {"atol": within(1e-5, 1e-4), "rtol": within(1.3e-6, 1e-4)}
        torch.testing.assert_close(values, expected, **close)

    def test_freeze(self, policy):
        assert freeze(policy.train()) is policy
        assert not policy.training
        assert not any(p.requires_grad for p in policy.parameters())


class TestLora:
    def test_section(self):
        section = LoraConfig(r=3, alpha=7.0, dropout=0.2, target_modules="q_proj")
        got = lora_config(section, "SEQ_CLS")
        assert (got.r, got.lora_alpha, got.lora_dropout) == (3, 7.0, 0.2)
        assert got.target_modules == "q_proj"
        assert got.modules_to_save == ["score"]
        policy = lora_config(section, "CAUSAL_LM", dropout=0.0)
        assert policy.lora_dropout == 0
        assert policy.modules_to_save is None

    def test_merged_computes_the_same(self, policy):
        import peft

        ids = ids_of([5, 6, 7])
        before = policy(ids).logits
        model = peft.get_peft_model(policy, lora_config(LoraConfig(r=2), "CAUSAL_LM"))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
        adapted = model(ids).logits
        assert not torch.allclose(adapted, before)
        plain = merge_adapter(model)
        assert type(plain) is LlamaForCausalLM
        close = {"atol": within(1e-5, 1e-4), "rtol": within(1e-4, 1e-3)}
        torch.testing.assert_close(plain(ids).logits, adapted, **close)
        assert merge_adapter(plain) is plain


def test_tokenizers_do_not_warn_about_forks(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    train_tokenizer(["a"], 300)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
