"""Reviews per second of label scoring with 2, 10 and 100 labels, words of one token and of several.

    python benchmarks/label_speed.py --model path/to/checkpoint --data dev.tsv

All sets of labels are scored in one process, in turn, the first round untimed. On a machine that others use too, the
processor's time says more. Probabilities of the words with several tokens are the gate: on the first reviews they agree
with those of a whole pass for each word, and no figure is shown where they do not. The last line is one JSON object.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from meter import environment
from workload import Workload, add_workload_arguments, model_folder

from minilora.errors import UserError
from minilora.evaluation.label_trie import LabelTrie
from minilora.evaluation.score import Prefix, ScoringOptions, label_probabilities
from minilora.qlora.batch import pack
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ClassificationPrompt, Example
from minilora.system.cli import build_parser, run_script
from minilora.system.process import tuned_process
from minilora.weights.load import load_model

GATE_REVIEWS = 4
# On Qwen2.5-0.5B in bfloat16 each way is up to 0.012 from float32, where the tests compare them to rounding.
PROBABILITY_TOLERANCE = 0.03
SHOPPING = "书籍 平板 手机 水果 洗发水 热水器 蒙牛 衣服 计算机 酒店"
# Names of app categories, of one to six tokens each in Qwen2.5.
APPS = (
    "打车 地图导航 免费WIFI 租车 同城服务 快递物流 婚庆 家政 公共交通 政务 社区服务 薅羊毛 魔幻 仙侠 卡牌 飞行空战 "
    "射击游戏 休闲益智 动作类 体育竞技 棋牌中心 经营养成 策略 MOBA 辅助工具 约会社交 即时通讯 工作社交 论坛圈子 "
    "婚恋社交 情侣社交 社交工具 生活社交 微博博客 新闻 漫画 小说 技术 教辅 问答交流 搞笑 杂志 百科 影视娱乐 求职 "
    "兼职 视频 短视频 音乐 直播 电台 K歌 成人 中小学 职考 公务员 英语 视频教育 高等教育 成人教育 艺术 语言 "
    "旅游资讯 综合预定 民航 铁路 酒店 行程管理 民宿短租 出国 工具 亲子儿童 母婴 驾校 违章 汽车咨询 汽车交易 "
    "日常养车 行车辅助 租房 买房 装修家居 电子产品 问诊挂号 养生保健 医疗服务 减肥瘦身 美妆美业 菜谱 餐饮店 "
    "体育咨讯 运动健身 支付 保险 股票 借贷 理财 彩票 记账 银行"
)


def label_sets(base: ClassificationPrompt) -> dict[str, ClassificationPrompt]:
    """A prompt for each set of labels."""
    several = [word for word in APPS.split() if len(base.tokenizer.encode(word)) > 1]
    words = {
        "2 labels of one token": base.labels,
        "10 labels": SHOPPING.split(),
        "10 labels of several tokens": several[:10],
        "100 labels": APPS.split(),
    }
    return {
        name: ClassificationPrompt(base.tokenizer, base.system, base.instruction, tuple(labels), base.max_length)
        for name, labels in words.items()
    }


@torch.inference_mode()
def a_pass_for_each_word(
    model: Qwen2ForCausalLM, prefix: Prefix, examples: Sequence[Example], prompt: ClassificationPrompt
) -> torch.Tensor:
    """(n, labels) probabilities: every question once more with each word, its logits in float32."""
    scores = torch.zeros(len(examples), len(prompt.labels), dtype=torch.float64)
    for column, word in enumerate(prompt.scored_ids):
        questions = [example.input_ids[: example.answer_start] for example in examples]
        answered = [Example(ids + word, [False] * len(ids) + [True] * len(word)) for ids in questions]
        batch = pack(answered, cached_prefix=prefix.num_tokens)
        hidden = model(batch.to(model.head_weight.device), prefix.cache).float()
        log_p = (hidden @ model.head_weight.float().T).log_softmax(1).cpu().gather(1, batch.targets[:, None]).squeeze(1)
        scores[:, column].index_add_(0, batch.example_indices, log_p.double())
    return scores.softmax(1)


@tuned_process()
def main() -> None:
    """Checks the gate, times all sets in turn and reports."""
    parser = build_parser(__doc__, "")
    add_workload_arguments(parser)
    parser.add_argument("--reviews", type=int, default=64, help="reviews to score")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.reviews, arguments.repeats = 8, 1
    data = str(Path(arguments.data).resolve()) if arguments.data else ""
    work = Workload(str(model_folder(arguments)), data, "", 32, 1, arguments.device, 8)
    model = load_model(Path(work.model), work.dtype, device=work.device).eval()
    base, reviews = work.prompt(), work.examples(arguments.reviews)
    prefix = Prefix.of(model, base.prefix)
    prompts = label_sets(base)
    checked = prompts["10 labels of several tokens"]
    found = label_probabilities(model, prefix, reviews[:GATE_REVIEWS], checked, ScoringOptions(32))
    expected = a_pass_for_each_word(model, prefix, reviews[:GATE_REVIEWS], checked)
    difference = float((torch.from_numpy(found) - expected).abs().max())
    if not difference <= PROBABILITY_TOLERANCE:
        raise UserError(f"probabilities differ by {difference:.3f} from a pass for each word, no figure is shown")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in prompts}
    for _ in range(arguments.repeats + 1):
        for name, prompt in prompts.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            label_probabilities(model, prefix, reviews, prompt, ScoringOptions(32))
            times[name].append((time.perf_counter() - start, time.process_time() - start_cpu))
    tokens = {name: len(LabelTrie(prompt.scored_ids).inner_tokens) for name, prompt in prompts.items()}
    own = statistics.mean(example.answer_start - prefix.num_tokens for example in reviews)
    print(f"{len(reviews)} reviews of {own:.0f} tokens in the mean behind a prefix of {prefix.num_tokens}\n")
    table = report(times, tokens, len(reviews))
    print(json.dumps({"sets": table, "largest_probability_difference": difference, **environment()}))


def report(times: dict[str, list[tuple[float, float]]], tokens: dict[str, int], reviews: int) -> dict[str, Any]:
    """Prints the table, in which the first set is 1, and returns it; `times` are wall and processor seconds by set."""
    print("| | tokens behind each review | reviews/s (slowest to fastest) | time | processor time |")
    print("|---|---|---|---|---|")
    table = {}
    baseline = next(iter(times.values()))[1:]  # the first round is untimed
    for name, (_, *own) in times.items():
        speeds = [reviews / wall for wall, _ in own]
        ratios = [
            statistics.median(mine[kind] / theirs[kind] for mine, theirs in zip(own, baseline, strict=True))
            for kind in (0, 1)
        ]
        speed = statistics.median(speeds)
        low_high = f"{min(speeds):.2f} to {max(speeds):.2f}"
        print(f"| {name} | {tokens[name]} | {speed:.2f} ({low_high}) | {ratios[0]:.2f} | {ratios[1]:.2f} |")
        table[name] = {"reviews_per_s": speed, "time": ratios[0], "processor_time": ratios[1], "tokens": tokens[name]}
    return table


if __name__ == "__main__":
    run_script(main)
