"""Recurrent networks, and an encoder and a decoder of sequences of tokens."""

import torch
from torch import Tensor, nn

from fastvae._types import RecurrentCell, check_choice
from fastvae.models.networks.layers import RELU, Layers

_CELLS: dict[str, type[nn.GRUCell | nn.LSTMCell]] = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}
# The hidden values of a step, ``(batch, hidden)``, and of an LSTM its cells too.
State = tuple[Tensor, ...]


class Recurrent(nn.Module):
    """A GRU or an LSTM of one layer that reads a whole sequence, or goes on by a single step with the same weights.

    ``torch.nn.GRU`` and ``LSTM`` have no single step, and torch.compile takes neither into one graph.

    Args:
        cell: ``"gru"`` or ``"lstm"``.
        inputs, hidden: units of a step's input and of its output.
    """

    def __init__(self, cell: RecurrentCell, inputs: int, hidden: int):
        super().__init__()
        check_choice("cell", cell, _CELLS)
        self.kind, self.hidden = cell, hidden
        self.cell = _CELLS[cell](inputs, hidden)

    @property
    def num_states(self) -> int:
        """Tensors of a state."""
        return 2 if self.kind == "lstm" else 1

    def forward(self, x: Tensor, state: State) -> Tensor:
        """The outputs of all steps of ``x``, ``(batch, length, inputs)``, from a state on: ``(batch, length, hidden)``."""
        if torch.compiler.is_compiling():
            # The compiler has no backward pass of the LSTM that torch has for CPUs.
            outputs = []
            for step in x.unbind(1):
                state = self.step(step, state)
                outputs.append(state[0])
            return torch.stack(outputs, dim=1)
        weights = [self.cell.weight_ih, self.cell.weight_hh, self.cell.bias_ih, self.cell.bias_hh]
        states = [part.unsqueeze(0) for part in state]
        # Biases, one layer, no dropout, one direction, and the batch first.
        options = True, 1, 0.0, self.training, False, True
        if self.kind == "lstm":
            return torch.lstm(x, states, weights, *options)[0]
        return torch.gru(x, states[0], weights, *options)[0]

    def step(self, x: Tensor, state: State) -> State:
        """The state after one more input, ``(batch, inputs)``; the output is its first tensor."""
        return self.cell(x, state) if self.kind == "lstm" else (self.cell(x, state[0]),)


class TokenEncoder(nn.Module):
    """From tokens to a code: an embedding, a recurrent network, and a linear map of its output at the last token that is no padding.

    Args:
        num_tokens: size of the vocabulary.
        embedding, hidden: units of a token and of the recurrent network.
        code_dim: units that come out.
        cell: ``"gru"`` or ``"lstm"``.
        pad: the token of padding, which stands behind all others.
        layers: the options of the linear layers; dropout acts on the embeddings.
    """

    def __init__(
        self,
        num_tokens: int,
        embedding: int,
        hidden: int,
        code_dim: int,
        *,
        cell: RecurrentCell = "gru",
        pad: int = 0,
        layers: Layers = RELU,
    ):
        super().__init__()
        self.pad = pad
        self.embedding = nn.Sequential(nn.Embedding(num_tokens, embedding, padding_idx=pad), *layers.dropouts())
        self.recurrent = Recurrent(cell, embedding, hidden)
        self.code = layers.prepare(nn.Linear(hidden, code_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embedding(tokens)
        nothing = embedded.new_zeros(len(tokens), self.recurrent.hidden)
        outputs = self.recurrent(embedded, (nothing,) * self.recurrent.num_states)
        # What comes before the padding does not depend on it. Without any token the output behind the first padding stands for it.
        last = ((tokens != self.pad).sum(1) - 1).clamp(min=0)
        return self.code(outputs[torch.arange(len(tokens), device=tokens.device), last])


class TokenDecoder(nn.Module):
    """From a code and the tokens so far to the logits of the next one: a recurrent network that begins at a linear map of the code, and has
    the code beside each token as its input.

    Args:
        num_tokens: size of the vocabulary.
        embedding, hidden: units of a token and of the recurrent network.
        latent_dim: units of the code.
        cell: ``"gru"`` or ``"lstm"``.
        layers: the options of the linear layers; dropout acts on the embeddings and on what the logits are computed from.
    """

    def __init__(
        self, num_tokens: int, embedding: int, hidden: int, latent_dim: int, *, cell: RecurrentCell = "gru", layers: Layers = RELU
    ):
        super().__init__()
        self.embedding = nn.Sequential(nn.Embedding(num_tokens, embedding), *layers.dropouts())
        self.recurrent = Recurrent(cell, embedding + latent_dim, hidden)
        self.initial = layers.prepare(nn.Linear(latent_dim, self.recurrent.num_states * hidden), "tanh")
        self.logits = nn.Sequential(*layers.dropouts(), layers.prepare(nn.Linear(hidden, num_tokens)))

    def start(self, z: Tensor) -> State:
        """The state before the first token."""
        return self.initial(z).tanh().split(self.recurrent.hidden, dim=1)

    def forward(self, z: Tensor, tokens: Tensor) -> Tensor:
        """The logits behind each token: ``(batch, length, num_tokens)``."""
        given = z.unsqueeze(1).expand(-1, tokens.shape[1], -1)
        return self.logits(self.recurrent(torch.cat([self.embedding(tokens), given], dim=2), self.start(z)))

    def step(self, z: Tensor, token: Tensor, state: State) -> tuple[Tensor, State]:
        """The logits ``(batch, num_tokens)`` behind one more token ``(batch,)``, and the state."""
        state = self.recurrent.step(torch.cat([self.embedding(token), z], dim=1), state)
        return self.logits(state[0]), state
