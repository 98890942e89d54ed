"""What the paper itself reports for LLaMA-7B, as printed (arXiv:2305.18403).

Odd values are left as they are. Table 2 gives the dense model 67.45 on ARC-c, which is its ARC-e
(Table 5: 41.38). The same model of 50 % has a perplexity of 11.60 in Table 2 (LaMini), 18.37 in
Table 7 and 18.21 in Table 8 (both C4). Figures 4 and 6 are curves without printed values.

``FIGURES[table][ratio][row][column]``: times in seconds, memory in bytes, accuracies as shares.
"""

from collections.abc import Mapping, Sequence

Figures = Mapping[float, Mapping[str, Mapping[str, float]]]

_QUALITY = ("WikiText2", "PTB", "average")
_COST = ("s/iter", "peak memory", "total time")
# Printed in GB and in hours.
_FACTORS = {"WikiText2": 1, "PTB": 1, "s/iter": 1, "peak memory": 1e9, "total time": 3600}


def _read(columns: Sequence[str], text: str) -> Figures:
    """Read a printed table: each line has a ratio, the name of a row, and a value per column."""
    figures: dict[float, dict[str, dict[str, float]]] = {}
    for line in text.strip().splitlines():
        ratio, row, *printed = line.split()
        named = zip(columns, map(float, printed), strict=True)
        figures.setdefault(float(ratio), {})[row] = {
            # Accuracies are printed in percent.
            name: value * _FACTORS[name] if name in _FACTORS else round(value / 100, 4)
            for name, value in named
        }
    return figures


FIGURES: dict[str, Figures] = {
    "2": _read(
        (
            *("WikiText2", "PTB", "mmlu", "openbookqa", "arc_easy", "winogrande"),
            *("arc_challenge", "piqa", "hellaswag", "average"),
        ),
        """
        0.0  dense      5.69   8.93   37.10  42.40  67.45  67.01  67.45  78.35  72.99  65.34
        0.2  magnitude  9.06   13.80  27.84  35.80  65.36  61.33  38.74  74.87  63.90  56.67
        0.2  wanda      8.64   12.66  28.35  35.26  68.96  64.01  38.46  74.80  52.63  58.68
        0.2  gradient   8.14   12.38  33.67  38.8   70.62  65.82  40.7   77.37  66.6   62.36
        0.2  lora-8bit  7.70   11.91  36.45  38.1   70.25  65.93  41.43  77.10  68.90  60.29
        0.2  lora       7.63   11.87  36.81  38.6   70.20  66.77  41.89  77.48  68.64  62.70
        0.3  magnitude  11.38  16.90  26.38  33.67  65.58  60.79  37.47  73.15  60.35  55.16
        0.3  wanda      10.10  15.83  27.90  34.90  65.06  61.16  39.44  74.38  60.84  55.96
        0.3  gradient   9.36   13.82  30.67  34.86  66.2   63.85  40.55  75.60  65.12  57.70
        0.3  lora-8bit  8.83   13.30  33.36  36.40  69.48  62.31  41.93  77.40  65.91  58.90
        0.3  lora       8.79   13.33  33.60  36.20  69.61  62.75  41.21  77.48  66.68  58.98
        0.5  magnitude  18.36  23.88  21.84  30.26  53.61  55.86  36.98  67.10  53.10  49.48
        0.5  wanda      17.38  21.34  24.15  28.78  52.68  55.98  34.20  70.38  54.12  49.35
        0.5  gradient   16.41  20.85  25.60  33.12  55.36  56.12  34.98  73.25  58.60  51.90
        0.5  lora-8bit  11.65  17.41  27.71  35.30  60.54  56.13  40.58  74.89  59.86  54.55
        0.5  lora       11.60  17.39  27.84  35.80  60.38  56.97  40.12  75.39  60.21  54.81
        """,
    ),
    "4": _read(
        (*_COST, "WikiText2"),
        """
        0.5  gradient   38.87  38.6  5.3  11.48
        0.5  magnitude  13.08  16.8  1.8  17.38
        0.5  lora       14.13  18.3  2.0  11.60
        0.5  lora-8bit  15.63  13.8  2.0  12.38
        """,
    ),
    "5": _read(
        (
            *("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"),
            *("openbookqa", "average"),
        ),
        """
        0.0  dense      73.18  78.35  72.99  67.01  67.45  41.38  42.40  63.25
        0.2  magnitude  61.89  70.81  58.34  56.87  54.87  34.02  38.40  53.59
        0.2  wanda      65.75  74.70  64.52  59.35  60.65  36.26  39.40  57.23
        0.2  gradient   64.62  77.20  68.80  63.14  64.31  36.77  39.80  59.23
        0.2  lora-8bit  65.37  76.65  69.41  63.78  65.45  36.12  39.50  59.46
        0.2  lora       65.62  79.31  70.00  62.76  65.87  37.69  39.14  60.05
        0.5  magnitude  47.40  54.36  33.49  53.10  37.88  26.60  30.12  40.42
        0.5  wanda      50.90  57.38  38.12  55.98  42.68  34.20  38.78  45.43
        0.5  gradient   60.28  69.31  47.06  53.43  45.96  29.18  35.60  48.69
        0.5  lora-8bit  61.43  70.88  47.65  55.12  45.78  30.50  35.62  49.56
        0.5  lora       61.88  71.53  47.86  55.01  45.13  31.62  34.98  49.71
        """,
    ),
    "6": _read(  # The paper does not say at which ratio.
        _COST,
        """
        0.5  gradient          38.87   38.6  5.3
        0.5  gradient-offload  115.67  19.5  25.8
        0.5  lora              14.13   18.3  2.0
        """,
    ),
    "7": _read(
        _QUALITY,
        """
        0.2  joint     12.93  22.52  60.05
        0.2  separate  14.51  24.30  57.18
        0.5  joint     18.37  28.68  49.71
        0.5  separate  21.78  40.39  47.56
        """,
    ),
    "8": _read(  # Nor here; the averages are those of 50 %.
        _QUALITY,
        """
        0.5  every-1   18.57  29.02  49.37
        0.5  every-5   18.63  28.73  49.16
        0.5  every-10  18.21  28.68  49.59
        0.5  every-20  18.47  28.70  49.71
        """,
    ),
}
