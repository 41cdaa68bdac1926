"""What is seen of a rollout: logged figures, and the samples as columns."""

from ..functional import kl_k1, kl_k3, masked_sum
from .experience import TokenStatistics
from .samples import Samples
from .text_module import TextModule

ON_BAR = ("reward", "kl")


def report(module: TextModule, stage: str, samples: Samples, statistics: TokenStatistics) -> dict[str, list]:
    """Log figures of sampled responses under `stage/`, and return them as columns: prompt, response, reward, kl, ..."""
    rollout, scores = samples.rollout, samples.scores
    mask, logprobs = rollout.response_mask, statistics[:2]
    components = {f"reward/{name}": values for name, values in scores.components.items()}
    kl = masked_sum(kl_k1(*logprobs), mask, dim=1)  # (B,) nats per sequence
    lengths = mask.sum(1)
    per_sequence = {"reward": scores.total, **components, "kl": kl}
    per_sequence |= {"response_length": lengths.float(), "eos_rate": rollout.ended.float()}
    for name, values in per_sequence.items():
        module.log_mean(f"{stage}/{name}", values, prog_bar=name in ON_BAR, batch_size=len(mask))
    for name, values in {"kl_k3_per_token": kl_k3(*logprobs), "entropy": statistics.entropy}.items():
        module.log_mean(f"{stage}/{name}", values, mask, batch_size=len(mask))
    columns = {"reward": scores.total, **components, "kl": kl, "length": lengths, "ended": rollout.ended}
    return {
        "prompt": samples.prompts,
        "response": samples.responses,
        **{name: values.tolist() for name, values in columns.items()},
    }
