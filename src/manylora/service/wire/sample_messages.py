"""An asample goes from the wire to `types`, and its result back.

Shapes: M tokens of a prompt, C candidates of a prompt token, E listed entries, n new tokens.
"""

from dataclasses import replace

import numpy as np

from manylora.service.http_errors import TooLarge
from manylora.service.wire import wire_pb2 as pb
from manylora.service.wire.codec import digest_json
from manylora.service.wire.messages import SampleRequest, WirePrompt, WireTensor
from manylora.service.wire.pieces import CSR, SampleSubmit, Wanted
from manylora.service.wire.reading import read_json
from manylora.service.wire.wire_limits import WireLimits
from manylora.service.wire.wire_tensors import check_csr, densify, listed
from manylora.types import DataError, PromptScores, SampleResult, Scoring, TopK, Unsupported
from manylora.types.data import Array

NOTHING = -1  # a candidate that asks nothing


def decode_sample(body: bytes, limits: WireLimits) -> SampleSubmit:
    """Decode a whole asample body; raises as `read_sample` does."""
    return unpack(read_sample(body, limits))


def unpack(submit: SampleSubmit) -> SampleSubmit:
    """Return a request with its candidates [M - 1, C] in a dense array."""
    if submit.packed is None:
        return submit
    csr, values_E = submit.packed
    dense = densify(csr, values_E, NOTHING)
    return replace(
        submit,
        scoring=replace(submit.scoring, candidates=dense),
        wanted=replace(submit.wanted, candidates=dense),
        packed=None,
    )


def read_sample(body: bytes, limits: WireLimits) -> SampleSubmit:
    """Read an asample body, but for what grows when it is decoded. Raises Malformed: it is not a
    SampleRequest; DataError, TooLarge, Unsupported: as for forward_backward."""
    request = read_json(SampleRequest, body)
    _refuse_by_name(request)
    prompt_M = _prompt(request.prompt, limits)
    params = request.sampling_params
    if params.top_k == 0:
        raise DataError("top_k is 0; give -1 for all tokens, or a number ≥ 1")
    _check_sizes(request, prompt_M.size, limits)
    candidates, packed = _candidates(request.target_prompt_logprobs, prompt_M.size, limits)
    stop, stop_strings = _stops(params.stop)
    return SampleSubmit(
        sampling_session_id=request.sampling_session_id,
        seq_id=request.seq_id,
        prompt=prompt_M,
        num_samples=request.num_samples,
        max_tokens=params.max_tokens,
        seed=params.seed,
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        stop=stop,
        stop_strings=stop_strings,
        scoring=Scoring(
            prompt=bool(request.prompt_logprobs),
            prompt_last_n=request.prompt_logprobs_last_n,
            topk_prompt=request.topk_prompt_logprobs,
            topk_sampled=request.topk_sample_logprobs,
            candidates=candidates,
        ),
        wanted=Wanted(
            prompt_logprobs=bool(request.prompt_logprobs),
            candidates=candidates,
            csr=None if packed is None else packed[0],
        ),
        packed=packed,
        body=body,
        digest=digest_json(request),
    )


def _refuse_by_name(request: SampleRequest) -> None:
    if request.prompt_alt_tokens_k:
        raise Unsupported("prompt_alt_tokens_k is not supported")
    if request.record_stability_info:
        raise Unsupported("record_stability_info is not supported")


def _prompt(prompt: WirePrompt, limits: WireLimits) -> Array:
    for index, chunk in enumerate(prompt.chunks):
        if chunk.type != "encoded_text":
            raise Unsupported(
                f"prompt chunk {index} is of type {chunk.type!r}; only tokens are supported"
            )
        if chunk.tokens is None:
            raise DataError(f"prompt chunk {index} has no tokens")
    prompt_M = np.concatenate(
        [np.empty(0, np.int64), *(np.asarray(c.tokens, np.int64) for c in prompt.chunks)]
    )
    if not 1 <= prompt_M.size <= limits.tokens_each:
        raise DataError(
            f"the prompt has {prompt_M.size} tokens; 1 to {limits.tokens_each} are supported"
        )
    return prompt_M


def _check_sizes(request: SampleRequest, length: int, limits: WireLimits) -> None:
    if request.num_samples > limits.samples:
        raise TooLarge(f"num_samples is {request.num_samples}; at most {limits.samples}")
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        if getattr(request, name) > limits.topk:
            raise TooLarge(f"{name} is {getattr(request, name)}; at most {limits.topk}")
    if length * request.topk_prompt_logprobs > limits.cells:
        raise TooLarge(f"topk_prompt_logprobs of this prompt has more than {limits.cells} cells")
    # How long the answers may become is the context's to say, which the hub knows.
    check_answer_cells(request.num_samples, 1, request.topk_sample_logprobs, limits.cells)
    last_n = request.prompt_logprobs_last_n
    if last_n is not None and not request.prompt_logprobs:
        raise DataError("prompt_logprobs_last_n needs prompt_logprobs")
    if last_n is not None and last_n > length - 1:
        raise DataError(
            f"prompt_logprobs_last_n is {last_n}; the prompt has {length - 1} tokens to score"
        )


def check_answer_cells(num_samples: int, max_tokens: int, topk: int, cells: int) -> None:
    """Raise TooLarge if the likeliest tokens of all answers are more than `cells` numbers."""
    if num_samples * max_tokens * topk > cells:
        raise TooLarge(
            f"topk_sample_logprobs of {num_samples} answers of {max_tokens} tokens has more than "
            f"{cells} cells"
        )


def _stops(
    stop: str | list[str] | list[int] | None,
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Return stop tokens and stop strings.

    Token ids replace the model's own end, and an empty list is a list of them. Strings come beside
    it: renderers that stop at a string also expect an answer that the model itself ended.
    """
    if stop is None:
        return None, ()
    texts = [stop] if isinstance(stop, str) else [item for item in stop if isinstance(item, str)]
    if "" in texts:
        raise DataError("a stop string is empty; it would end every answer at once")
    if texts:
        return None, tuple(texts)
    return tuple(item for item in stop if isinstance(item, int)), ()


def _candidates(
    tensor: WireTensor | None, length: int, limits: WireLimits
) -> tuple[Array | None, tuple[CSR, Array] | None]:
    """Return candidates [M - 1, C] if they came dense; if sparse, their layout and values."""
    if tensor is None:
        return None, None
    what = "target_prompt_logprobs"
    shape = tuple(tensor.shape or ())
    if len(shape) != 2 or shape[0] != length - 1:
        raise DataError(f"{what} has shape {shape}; the prompt needs ({length - 1}, C)")
    if not 1 <= shape[1] <= limits.targets or shape[0] * shape[1] > limits.cells:
        raise TooLarge(
            f"{what} has shape {shape}; 1 to {limits.targets} candidates and {limits.cells} cells"
        )
    values_E = np.asarray(tensor.data, dtype=np.int64)
    if values_E.size and values_E.min() < NOTHING:
        raise DataError(f"{what} holds {values_E.min()}; it takes token ids, and -1 for nothing")
    crow, col = tensor.sparse_crow_indices, tensor.sparse_col_indices
    if (crow is None) != (col is None):
        raise DataError(f"{what} needs both of sparse_crow_indices and sparse_col_indices")
    if crow is None or col is None:
        if values_E.size != shape[0] * shape[1]:
            raise DataError(f"{what} has {values_E.size} elements; its shape is {shape}")
        return values_E.reshape(shape), None
    crow_R, col_E = np.asarray(crow, dtype=np.int64), np.asarray(col, dtype=np.int64)
    csr = check_csr(crow_R, col_E, (shape[0], shape[1]), values_E.size, what)
    return None, (csr, values_E)


# --- the answer -------------------------------------------------------------------------------


def encode_sample(result: SampleResult, wanted: Wanted) -> bytes:
    """Encode a result as a SampleResponse, with what of the question the answer must repeat
    (`SampleSubmit.wanted`)."""
    response = pb.SampleResponse()
    for sequence in result.sequences:
        stopped = sequence.stop_reason == "stop"
        message = response.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if stopped else pb.STOP_REASON_LENGTH,
            tokens=np.asarray(sequence.tokens, dtype="<i4").tobytes(),
            logprobs=np.asarray(sequence.logprobs, dtype="<f4").tobytes(),
        )
        if sequence.topk is not None:
            message.topk_sampled_logprobs.CopyFrom(_topk(sequence.topk))
    if result.prompts:
        _add_prompt(response, result.prompts[0], wanted)
    return response.SerializeToString(deterministic=True)


def _add_prompt(response: pb.SampleResponse, scores: PromptScores, wanted: Wanted) -> None:
    if wanted.prompt_logprobs:
        response.prompt_logprobs = np.asarray(scores.logprobs, dtype="<f4").tobytes()
    if scores.topk is not None:
        response.topk_prompt_logprobs.CopyFrom(_topk(scores.topk))
    if scores.candidates is None or wanted.candidates is None:
        return
    answers = np.where(wanted.candidates == NOTHING, np.float32(0), scores.candidates)
    tensor = response.target_prompt_logprobs
    tensor.dtype = pb.DTYPE_FLOAT32
    tensor.shape.extend(answers.shape)
    if wanted.csr is None:
        tensor.dense = answers.astype("<f4").tobytes()
        return
    tensor.sparse_csr.values = listed(wanted.csr, answers).astype("<f4").tobytes()
    tensor.sparse_csr.crow_indices = wanted.csr.crow.astype("<i8").tobytes()
    tensor.sparse_csr.col_indices = wanted.csr.col.astype("<i8").tobytes()


def _topk(topk: TopK) -> pb.TopkLogprobs:
    length, k = topk.tokens.shape
    return pb.TopkLogprobs(
        token_ids=np.asarray(topk.tokens, dtype="<i4").tobytes(),
        logprobs=np.asarray(topk.logprobs, dtype="<f4").tobytes(),
        k=k,
        length=length,
    )
