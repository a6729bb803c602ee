"""The integers of compressed-tensors, QuaRot and SpinQuant."""

from references.agreement import check_format, check_searched

from harness.formats import Integer


def compressed_tensors_format(bits, kind, granularity, group):
    return Integer(
        bits=int(bits),
        symmetric=kind == "sym",
        granularity=granularity,
        group_size=int(group) if group else None,
        int_scale="half_range",
        zp_order="add_then_round",
        zp_range="signed",
        incl0="always",
        degenerate="eps",
        compute_dtype="input",
    )


def compressed_tensors_int(x, golden, bits, kind, granularity, group):
    check_format(compressed_tensors_format(bits, kind, granularity, group), x, golden)


def quarot(x, golden, part, bits, kind, clip, granularity, group, mse):
    format = Integer(
        bits=int(bits),
        symmetric=kind == "sym",
        granularity=granularity,
        group_size=int(group) if group else None,
        clip=float(clip or 1),
        incl0="always" if part == "w" else "auto",
        role="weight" if part == "w" else "activation",
        observer="mse" if mse else "minmax",
        compute_dtype="input" if part == "a" and group else "float32",
    )
    (check_searched if mse else check_format)(format, x, golden)
