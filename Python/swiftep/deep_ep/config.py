"""How a call is tuned, and how large a buffer would be."""

from __future__ import annotations

from ._checks import required

#: Entries of a token's top-k and scales, at most, as DeepEP's hints count them.
_TOP_K_MAX = _SCALES_MAX = 128


class Config:
    """How a call of the throughput path is tuned. Only `num_sms` matters here: rows are written where they belong, so that
    there are no chunks, nor queues for them.

    Args:
        num_sms: multiprocessors that a call takes, at most as many as the buffer has; on CPUs of no meaning.
        num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens, num_max_rdma_chunked_send_tokens,
        num_max_rdma_chunked_recv_tokens: as DeepEP takes them; of no meaning but for the hints.

    Raises:
        InvalidArgument: what DeepEP refuses, too.
    """

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        nvl = (num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens)
        rdma = (num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens)
        required(num_sms >= 0, "num_sms", "at least 0", num_sms)
        required(0 < nvl[0] < nvl[1], "num_max_nvl_chunked_send_tokens", f"in 1..<{nvl[1]}", nvl[0])
        required(rdma[0] > 0, "num_max_rdma_chunked_send_tokens", "at least 1", rdma[0])
        aligned = -(-rdma[1] // rdma[0]) * rdma[0]
        required(2 * rdma[0] <= aligned, "num_max_rdma_chunked_send_tokens", f"at most {aligned // 2}", rdma[0])
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens, self.num_max_nvl_chunked_recv_tokens = nvl
        self.num_max_rdma_chunked_send_tokens, self.num_max_rdma_chunked_recv_tokens = rdma[0], aligned

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes that DeepEP would want for its queues, for callers that pass them on. What is taken here, a plan says, once the
        first call has said how many tokens there are."""
        token_bytes = hidden_bytes + _TOP_K_MAX * (8 + 4) + _SCALES_MAX * 4
        rows = self.num_sms // 2 * num_ranks * self.num_max_nvl_chunked_recv_tokens
        return -(-rows * token_bytes // 128) * 128

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: there is no network yet."""
        return 0
