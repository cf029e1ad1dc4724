"""More of the table of cases: layers and parameters in scans, in checkpoints and behind rules of their own."""

import jax
import jax.numpy as jnp
import numpy as np
from cases import B, _ids, _normal, case
from jax import lax


@case(
    "recurrent: kernel, bias and scale in a scan",
    {"w": 0.5 * _normal(4, 4), "u": _normal(3, 4), "b": _normal(4), "s": _normal(4)},
    _normal(B, 6, 3),
)
def _(p, x):
    def step(h, row):
        h = jnp.tanh(h @ p["w"] + row @ p["u"] + p["b"])
        return h, h * p["s"]

    return (lax.scan(step, jnp.zeros(4), x, reverse=True)[1] ** 2).sum()


@case("layers stacked in a scan", {"w": 0.5 * _normal(3, 4, 4), "b": _normal(3, 4)}, _normal(B, 5, 4))
def _(p, x):
    return lax.scan(lambda h, layer: (jnp.tanh(h @ layer["w"].T + layer["b"][None]), None), x, p)[0].sum()


@case("layers stacked in a scan of checkpoints", {"w": 0.5 * _normal(3, 4, 4), "b": _normal(3, 4)}, _normal(B, 5, 4))
def _(p, x):
    def block(h, layer):
        return jnp.tanh(h @ layer["w"] + layer["b"][None]), None

    return lax.scan(jax.checkpoint(block), x, p)[0].sum()


@case("convolution and tied embedding in a scan", {"k": _normal(3, 2, 2), "e": _normal(7, 2)}, _ids(0, 7, B, 4, 6))
def _(p, ids):
    def step(h, row):
        numbers = ("NWC", "WIO", "NWC")
        y = lax.conv_general_dilated(p["e"][row][None], p["k"], (1,), "SAME", dimension_numbers=numbers)[0]
        return jnp.tanh(h + y) @ p["e"].T @ p["e"] / 5, y.sum()

    h, ys = lax.scan(step, jnp.zeros((6, 2)), ids)
    return h.sum() + (ys**2).sum()


@case("a parameter begins the carry", {"h": _normal(4), "w": 0.5 * _normal(4, 4)}, _normal(B, 6, 4))
def _(p, x):
    return lax.scan(lambda h, row: (jnp.tanh(h @ p["w"] + row), None), p["h"], x)[0].sum()


@case("a scan in a scan", {"w": 0.5 * _normal(4, 4), "v": 0.5 * _normal(4, 4)}, _normal(B, 3, 4))
def _(p, x):
    def outer(h, row):
        h = lax.fori_loop(0, 2, lambda _, z: jnp.tanh(z @ p["w"]), h + row)
        return h @ p["v"], None

    return lax.scan(outer, jnp.zeros(4), x)[0].sum()


@case("a parameter changed in the body", {"w": 0.5 * _normal(4, 4), "m": _normal(3)}, _normal(B, 4))
def _(p, x):
    return lax.scan(lambda h, m: (jnp.tanh(h @ (m * p["w"])), (p["w"] * m).sum() * h), x, p["m"])[1].sum()


@case("a result of the body hangs on parameters alone", {"w": 0.5 * _normal(4, 4)}, _normal(B, 4))
def _(p, x):
    h, ys = lax.scan(lambda h, t: (jnp.tanh(h @ p["w"]), (t * p["w"] ** 2).sum()), x, jnp.arange(3.0))
    return h.sum() * ys.sum()


@case("checkpoint around layers", {"w": 0.5 * _normal(4, 4), "b": _normal(4), "e": _normal(5, 4)}, _ids(0, 5, B, 6))
def _(p, ids):
    return jax.checkpoint(lambda h: jnp.tanh(h @ p["w"] + p["b"][None]).sum())(
        jax.checkpoint(lambda i: jnp.sin(p["e"][i]))(ids)
    )


@case("a step that is the same for all examples", {"w": 0.5 * _normal(4, 4), "v": _normal(4, 4)}, _normal(B, 4))
def _(p, x):
    _, ys = lax.scan(lambda c, row: (c + 1.0, (jnp.tanh(c @ p["w"]), row @ p["v"])), jnp.ones(4), x[None])
    return (ys[0] * ys[1]).sum()


@jax.custom_vjp
def _clip_gradient(x):
    return x


_clip_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_vjp
def _decayed(x):
    return x


_decayed.defvjp(lambda x: (x, x), lambda x, g: (g + 0.3 * x,))


@case("a clipped parameter used twice in a body", {"w": 0.5 * _normal(4, 4)}, _normal(B, 4))
def _(p, x):
    def body(h):
        v = _clip_gradient(p["w"])
        return jnp.tanh(jnp.tanh(h @ v) @ v)

    return jax.checkpoint(body)(x).sum() + lax.scan(lambda h, _: (body(h), None), x, None, length=2)[0].sum()


@case("a custom_vjp that indexes a constant", {"w": _normal(4)}, _normal(B, 4))
def _(p, x):
    weigh = jax.custom_vjp(lambda h, t: h * t.sum())
    step = lambda t, g: lambda i, a: a + g * t[i]  # noqa: E731
    weigh.defvjp(lambda h, t: (h * t.sum(), t), lambda t, g: (lax.fori_loop(0, 2, step(t, g), 0 * g), None))
    return (weigh(p["w"] * x, jnp.array([1.0, 2.0])) ** 2).sum()


@case("a custom_vjp that answers zero with something", {"w": 0.5 * _normal(4, 4), "v": _normal(4, 4)}, _normal(B, 4))
def _(p, x):
    return jnp.tanh(_decayed(jnp.tanh(x @ p["v"])) @ _decayed(p["w"])).sum()


@case("a scan of no steps", {"a": _normal(4, 4), "b": _normal(4)}, _normal(B, 4))
def _(p, x):
    return lax.scan(lambda h, _: (jnp.tanh(h @ p["a"]), None), x, None, length=0)[0].sum() + x @ p["b"]


@case("ids narrower than the table is long", {"e": _normal(300, 3)}, _ids(0, 255, B, 6).astype(np.uint8))
def _(p, ids):
    numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
    return jnp.tanh(lax.gather(p["e"], ids[:, None], numbers, (1, 3), mode="clip")).sum() ** 2
