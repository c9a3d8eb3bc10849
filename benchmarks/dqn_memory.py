"""Memory of a token-level DQN with a large vocabulary: of its update beside PPO's on the same model, and of its replay.

    python benchmarks/dqn_memory.py TOKENIZER [--device cuda] [--out result.json]

TOKENIZER is a folder (or hub id) of GPT-2's tokenizer, V = 50,257. The model is a GPT-2 of random weights, 32 sequences of 32 new
tokens are learned from per update, and the replay holds 10,000 sequences. Each agent runs in a process of its own and takes one update
unmeasured, which makes the optimiser's moments; the second is measured: on the CPU the peak of the resident memory (VmHWM, so Linux), on
CUDA `torch.cuda.max_memory_allocated`. The exit status says whether every DQN stays within twice PPO, and the replay within 1 KB a
sequence beyond its ids.
"""

import argparse
import json
import sys
from typing import Any

import common
import gymnasium as gym
import numpy as np
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import textgym  # noqa: F401  (registers the ids)
from textgym.agents import DQN, PPO, CausalLMPolicy

SEQUENCES, NEW_TOKENS, REPLAY = 32, 32, 10_000
MOST_TIMES_PPO, MOST_BYTES = 2.0, 1024
AGENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ppo": (PPO, {"n_epochs": 1}),
    "dqn, soft, path": (DQN, {"beta": 0.05}),
    "dqn, soft, one step": (DQN, {"beta": 0.05, "consistency": "one_step"}),
    "dqn, hard": (DQN, {}),
    "dqn, hard, top-k 50": (DQN, {"top_k": 50}),
}


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Two updates of one agent; memory before and at the peak of the second, in bytes, and of the replay."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=options.width, n_layer=options.layers, n_head=options.width // 64
    )
    policy = CausalLMPolicy(GPT2LMHeadModel(config), tokenizer, device=options.device)
    prompts = [f"Text number {i} begins here, and it goes" for i in range(SEQUENCES)]
    envs = gym.make_vec(
        "TextGen-v0", num_envs=SEQUENCES, prompts=prompts, tokenizer=tokenizer, max_new_tokens=NEW_TOKENS,
        reward=lambda completions, **_: [float(len(text)) for text in completions],
    )  # fmt: skip
    agent_class, settings = AGENTS[name]
    if agent_class is DQN:
        settings = settings | {"buffer_size": REPLAY, "batch_size": SEQUENCES, "learning_starts": 0}
    agent = agent_class(policy, envs, 1e-4, seed=0, **settings)
    rollout = agent.collector.walk(np.arange(SEQUENCES), agent.sampling_generator)
    if agent_class is DQN:
        rollout = agent.with_reference(rollout)
        for _ in range(REPLAY // SEQUENCES + 1):
            agent.replay.add(rollout, rollout.rewards)
    agent.train(rollout)
    before = common.reset_peak(options.device)
    agent.train(rollout)
    result = {"before": before, "peak": common.peak(options.device)}
    if agent_class is DQN:
        ids = sum(agent.replay.tensors()[column].nbytes for column in ("prompt_ids", "completion_ids"))
        result |= {
            "replay_rows": len(agent.replay),
            "replay": agent.replay.num_bytes,
            "beyond_ids": (agent.replay.num_bytes - ids) / REPLAY,
        }
    return result


def main() -> int:
    options = parser().parse_args()
    if options.agent:
        print(json.dumps(measure(options.agent, options)))
        return 0
    results = {}
    print(f"{'agent':22}{'before':>10}{'peak':>10}{'update':>10}{'peak/PPO':>10}{'update/PPO':>12}{'bytes a row beyond ids':>26}   (MB)")
    for name in AGENTS:
        result = common.again("--agent", name)
        if result is None:
            raise SystemExit(f"{name} was killed: there is too little memory for it here.")
        results[name] = result
        result["update"] = result["peak"] - result["before"]
        result["peak_ratio"], result["update_ratio"] = (result[k] / results["ppo"][k] for k in ("peak", "update"))
        row = "".join(f"{result[key] / 1e6:10.1f}" for key in ("before", "peak", "update"))
        print(f"{name:22}{row}{result['peak_ratio']:10.2f}{result['update_ratio']:12.2f}{result.get('beyond_ids', float('nan')):26.1f}")
    passed = all(
        max(r["peak_ratio"], r["update_ratio"]) <= MOST_TIMES_PPO and r.get("beyond_ids", 0) <= MOST_BYTES for r in results.values()
    )
    print(f"{'within' if passed else 'NOT WITHIN'} {MOST_TIMES_PPO:g} times PPO and {MOST_BYTES} bytes a sequence beyond its ids")
    common.write(options.out, {"device": options.device, "torch": torch.__version__, "agents": results})
    return 0 if passed else 1


def parser() -> argparse.ArgumentParser:
    result = common.parser("Memory of DQN's update beside PPO's, and of DQN's replay, with a large vocabulary.")
    result.add_argument("tokenizer", help="folder or hub id of a tokenizer, GPT-2's for V = 50,257")
    result.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    result.add_argument("--width", type=int, default=256, help="of the model, a multiple of 64; default: 256")
    result.add_argument("--layers", type=int, default=4, help="of the model; default: 4")
    result.add_argument("--agent", default=None, choices=list(AGENTS), help="this one only, its numbers as JSON")
    return result


if __name__ == "__main__":
    sys.exit(main())
