"""Singular values drawn: each against its place, both as shares."""

from __future__ import annotations

from collections import defaultdict

from poise.checkpoint.inspecting import Inspection, Tensor
from poise.compare.report.looks import Figure, Trace, axis, figure, label, log_axis

from .roles import drawn, looks

POINTS = 160  # of a curve; a spectrum has thousands of values and no corners


def spectra(found: Inspection) -> Figure:
    """Of each role the first, the middle and the last matrix: dotted, dashed and solid."""
    by: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in found.tensors:
        if tensor.spectrum is not None and drawn(tensor) and tensor.spectrum.spectral > 0:
            by[tensor.described.role].append(tensor)
    traces: list[Trace] = []
    for role, look in looks(found).items():
        some = by.get(role, [])
        chosen = {0: "dot", len(some) // 2: "dash", len(some) - 1: "solid"} if some else {}
        for place, dash in chosen.items():
            spectrum = some[place].spectrum
            assert spectrum is not None
            called, count = label(some[place].name), len(spectrum.values)
            places = sorted({round(i * (count - 1) / (POINTS - 1)) for i in range(POINTS)})
            shorter = min(some[place].info.shape[0], some[place].info.numel // max(1, some[place].info.shape[0]))
            whole = shorter if spectrum.method == "lanczos" else count
            heights = [spectrum.values[at] / spectrum.spectral for at in places]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines" if count > 1 else "markers",
                    "x": [(at + 1) / whole for at in places],
                    "y": [height if height > 0 else None for height in heights],
                    "name": label(role),
                    "legendgroup": role,
                    "showlegend": dash == "solid",
                    "line": {"color": look.colour, "width": 1.5, "dash": dash},
                    "marker": {"color": look.colour, "symbol": look.symbol},
                    "hovertemplate": f"{called}<br>value %{{x:.1%}} of {whole}<br>%{{y:.3g}} of the largest<extra></extra>",
                }
            )
    across = axis("place, as a share of all singular values", range=[0, 1.01], tickformat=".0%")
    return figure(traces, 440, xaxis=across, yaxis=log_axis("singular value / largest (logarithmic)"))
