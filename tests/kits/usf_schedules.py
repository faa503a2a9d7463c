"""The forty solver schedules of thu-nics/USF (arXiv 2312.07243), as decisions in a short notation.

A line each for: name, evaluations, first step; times t_0 ... t_n; steps. A step reads N, D or V (noise, data,
DPM-Solver-v3), its order, l1 or l2 (so many points for the first derivative), r and a linear relaxation, c
for a corrector of one order more, or c(order:points) for another one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np

from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Derivative, Scale, SolverStep, Update

TEXT = """\
cifar10_edm_nfe3 3 average_x0
t 80.00001 7.735508 1.406949 0.2971435 0.002352291
s N1c D2 V3l1 V2r+0.05446023
cifar10_edm_nfe4 4 average_x0
t 80.00001 17.92353 3.653345 0.8157889 0.2060557 0.002612785
s V1c V2r-0.3822337c N2r-0.01698319 N1c D2
cifar10_edm_nfe5 5 zero_x0
t 80.00001 14.46386 3.352045 1.41732 0.2276964 0.05815972 0.002228111
s N1c V1 V2r-0.02994956c N2c D2r-0.05528744c V2
cifar10_edm_nfe6 6 average_x0
t 80.00001 15.02467 3.595415 1.003875 0.3990695 0.1385297 0.04694587 0.002398222
s V1 V2r+0.06342256c V3c V3c V3l1 V2r+0.2440129c N2r-0.04296373
cifar10_edm_nfe7 7 average_x0
t 80.00001 14.76378 3.595415 1.510843 1.003875 0.3990695 0.1414815 0.04597746 0.002398222
s V1c V2c D2r+0.02618638c V2r-0.0299306c N3c V2 N2c N3
cifar10_edm_nfe8 8 average_x0
t 80.00001 14.78537 3.595415 1.523504 0.9757785 0.3928927 0.1414815 0.04612027 0.01887184 0.002570489
s V1 V2c D2r+0.02618638c D3 D3c V2c N4c V2r-0.01270031c N1
cifar10_edm_nfe9 9 average_x0
t 80.00001 34.33786 5.334023 2.525569 0.945114 0.4347125 0.1732361 0.07318473 0.01273319 0.005617085
t 0.002586959
s N1 D2c V2r+0.001479587 V3r-0.04306019c D3r-0.04363301c V3r+0.008507723 V3 N2c D2r-0.1858158c N3l1
cifar10_edm_nfe10 10 average_x0
t 80.00001 34.33786 11.54477 5.334023 2.525569 0.945114 0.4347125 0.1732361 0.07318473 0.01273319
t 0.005290424 0.002586959
s V1 N2 D3c V2r+0.001479587 D3r-0.04306019c D3r-0.04363301c V3r+0.008507723 N3 N2c D3c N1
imagenet256_nfe3 3 zero_x0
t 1 0.8176362 0.6000562 0.4087893 0.001
s N1 D2r+0.1666667c D3 D1
imagenet256_nfe4 4 average_x0
t 1 0.8354654 0.667 0.5005 0.3126997 0.001042619
s D1c D2r+0.3333333c D2c D2r+0.3333333c D1
imagenet256_nfe5 5 average_x0
t 1 0.8663643 0.7143933 0.571153 0.4000764 0.2231674 0.001000219
s D1c N2c D1c N1c V3 N2
imagenet256_nfe6 6 no_afs
t 1 0.8229063 0.6677365 0.5004969 0.3741436 0.1675204 0.001081385
s V1c V2c V2r+0.04749973c V4c V2c N2
imagenet256_nfe7 7 zero_x0
t 1 0.915419 0.8446143 0.6658733 0.5515893 0.4615611 0.3007 0.08337085 0.001000059
s N1c N2r+0.4161011 D1c D1c D3 V2c N2r+0.3333333 N1
imagenet256_nfe8 8 zero_x0
t 1 0.94456 0.8885534 0.7560288 0.677473 0.5562004 0.4220614 0.3332795 0.1182453 0.001038357
s D1c D1 N1c D1 V2c D2 V3 D2r-0.01273398 N2
imagenet256_nfe9 9 average_x0
t 1 0.9096103 0.8000308 0.7009667 0.5995969 0.5004969 0.4011198 0.3207289 0.2009903 0.1008719 0.001016894
s V1c D2r+0.02418431 N3 V2 N2r+0.01438058c V2r-0.01722933c N2c N2c V2c V1
imagenet256_nfe10 10 no_afs
t 1 0.8302573 0.7303692 0.6931257 0.6036963 0.5449572 0.4190092 0.2744208 0.1373379 0.09167184
t 0.001007196
s D1c D2r+0.1666667c D3 V2r+0.1666667c V2c N3c D2c V3l1 V1 D1
lsun_nfe3 3 zero_x0
t 1 0.6099287 0.4885392 0.2988822 0.001753672
s V1c N2c N2r-0.2519699c N2
lsun_nfe4 4 zero_x0
t 1 0.7083439 0.506711 0.4368469 0.1885509 0.001660492
s D1 D2c N3c N2r-0.252252 N2
lsun_nfe5 5 zero_x0
t 1 0.7098948 0.4893683 0.4312123 0.3422424 0.1301893 0.001526405
s V1 V2c V2c D2 D2 V1
lsun_nfe6 6 zero_x0
t 1 0.8572857 0.6386249 0.5718571 0.4925212 0.2864286 0.1437143 0.00130194
s N1 D2r-0.1666667c D3 N2r+0.1666667c D3l1r+0.04702119 N2r-0.1666667 N2
lsun_nfe7 7 zero_x0
t 1 0.875125 0.7191789 0.5206919 0.5005 0.375625 0.2494924 0.1241032 0.001
s D1c D2r+0.3333333c D2r+0.4681126c D1c N2r+0.3333333c D2r+0.3333333c N2r+0.3333333c V1
lsun_nfe8 8 zero_x0
t 1 0.8618447 0.7180989 0.6263549 0.5929242 0.5220371 0.4093 0.2885048 0.05248442 0.001583604
s N1 V1c D3l1c D3c N4l2 D3 D2 N2r-0.1918465 N2
lsun_nfe9 9 zero_x0
t 1 0.9744719 0.728318 0.6259281 0.5367009 0.4876582 0.4712099 0.3493665 0.1425305 0.0681709 0.001026917
s N1c N1 D1 D3c D2c N2r-0.1666667 D3c D2r-0.1918465c N2 N1
lsun_nfe10 10 no_afs
t 1 0.8461256 0.6004 0.5931037 0.5070186 0.4459186 0.2618377 0.2437408 0.2327909 0.1122109 0.001173386
s D1 D2r+0.3333333c D3l1 N2r+0.3333333c D3l1c D2c D2r+0.3333333 N3l1r-0.09780617c V2r+0.3333333c D1
stable_diffusion_nfe3 3 no_afs
t 1 0.5984315 0.4131815 0.001088199
s D1 V2r+0.02248227 V1
stable_diffusion_nfe4 4 no_afs
t 1 0.7303827 0.4507203 0.2420104 0.00127445
s N1 N2r-0.1666667 N3r+0.005360854 V1
stable_diffusion_nfe5 5 no_afs
t 1 0.7350307 0.5233757 0.3162254 0.2044142 0.001431784
s N1 V2c D3l1 V4l2c V1
stable_diffusion_nfe6 6 no_afs
t 1 0.7397455 0.6782779 0.3674831 0.17576 0.05827207 0.00111765
s D1c D2r-0.1666667c D1c V2r-0.2223338 N2c D2
stable_diffusion_nfe7 7 no_afs
t 1 0.8342549 0.665612 0.4976415 0.3197333 0.2146369 0.1250131 0.001402419
s D1 N2r+0.008249635 N2r+0.04179824c V2c V2 V2 V2
stable_diffusion_nfe8 8 no_afs
t 1 0.8719344 0.7738405 0.7273465 0.5559691 0.4245531 0.1925328 0.01547717 0.001091957
s V1 D2 V3c V1c N2r+0.03893975 D2c N1c V2
stable_diffusion_nfe9 9 no_afs
t 1 0.8076022 0.6626945 0.6193468 0.5451172 0.3989887 0.2346777 0.2273391 0.09395617 0.001477407
s D1 V1 D3 V1 V2r+0.04249482 V2 N3 V2 V2
stable_diffusion_nfe10 10 no_afs
t 1 0.7799131 0.7219538 0.6882091 0.6806815 0.5225076 0.4230604 0.3028995 0.191176 0.07949489
t 0.0009999989
s N1c V1 V2 V1 N1 V2c V2 D2c D2 V2
cifar10_sde_nfe3 3 zero_x0
t 1 0.5958105 0.3129787 0.1341335 0.0008657603
s V1c N2r-0.03840285 V2 D2r-0.01416162
cifar10_sde_nfe4 4 zero_x0
t 1 0.6936505 0.4203201 0.2624265 0.0807959 0.0006716595
s D1c V2 N2c N2 D2r-0.1722151
cifar10_sde_nfe5 5 zero_x0
t 1 0.7014272 0.5599988 0.4101445 0.2196064 0.06616189 0.0006581547
s V1c V1 V3r+0.01368621c D3 D3r-0.02087524c N2r+0.02642847
cifar10_sde_nfe6 6 average_x0
t 1 0.7483327 0.5716546 0.466789 0.3130364 0.1746794 0.04571766 0.0009235621
s V1c V2 N3 N2r+0.05645488c N3l1r+0.01294147c D3l1r-0.0571127c V1
cifar10_sde_nfe7 7 average_x0
t 1 0.7277113 0.4364689 0.3770409 0.2251604 0.09251977 0.02332546 0.005843543 0.0004784797
s D1c V2r-0.1564377c V3c D3l1r-0.07208317 V3l1r-0.008568406 N2 V3l1r-0.03686094 N3
cifar10_sde_nfe8 8 average_x0
t 1 0.7684299 0.6615078 0.4601031 0.3770409 0.2366582 0.09251977 0.02332546 0.005843543 0.0003704724
s V1c V2r-0.05093187c V2c V3 D3l1c V2c D2 V3r-0.0571127 D2
cifar10_sde_nfe9 9 zero_x0
t 1 0.7480322 0.5885051 0.4406384 0.325721 0.3018309 0.1558388 0.08406466 0.03677916 0.02330811
t 0.0006288705
s D1c N1c(3:+1,-1) D3r-0.1666667c D2r+0.3333333c D3l1c D3l1r+0.5 N3l1r-0.3333333c D2r+0.5c N3c(2:+1) N3l1
cifar10_sde_nfe10 10 average_x0
t 1 0.9012074 0.7689812 0.541477 0.4607189 0.3504332 0.292047 0.1999808 0.08406466 0.02727891 0.007201559
t 0.0002025475
s N1 D1c V2c V1 D2r+0.3333333 V1c V3l1r+0.5 D2c D2r+0.5c D2r+0.03546184c N3l1
"""

FIRST = {"no_afs": "model", "zero_x0": "zero_x0", "average_x0": "mean"}
PARAM = {"N": "noise", "D": "data", "V": "ems"}
STEP = re.compile(r"([NDV])(\d)(?:l(\d))?(?:r([+-][\d.]+))?(c)?(?:\((\d):([+\d,-]+)\))?")


def _edm(t: float) -> float:
    return -math.log(t)


def _continuous(t: float) -> float:
    """ScoreSDE's VP: beta from 0.1 to 20."""
    log_alpha = -(t**2) * (20 - 0.1) / 4 - t * 0.1 / 2
    return log_alpha - 0.5 * math.log(-math.expm1(2 * log_alpha))


def _discrete(start: float, end: float, root: bool) -> Callable[[float], float]:
    """A thousand betas; log alpha is linear in t between them."""
    betas = np.linspace(start**0.5, end**0.5, 1000) ** 2 if root else np.linspace(start, end, 1000)
    log_alphas = 0.5 * np.cumsum(np.log1p(-betas))

    def lam(t: float) -> float:
        log_alpha = float(np.interp(1000 * t - 1, np.arange(1000), log_alphas))
        return log_alpha - 0.5 * math.log(-math.expm1(2 * log_alpha))

    return lam


LAMBDA: dict[str, Callable[[float], float]] = {
    "cifar10_edm": _edm,
    "cifar10_sde": _continuous,
    "imagenet256": _discrete(1e-4, 0.02, False),
    "lsun": _discrete(0.0015, 0.0195, True),
    "stable_diffusion": _discrete(0.00085, 0.012, True),
}


def usf_schedules() -> dict[str, SolverSchedule]:
    """All forty, by name."""
    found: dict[str, SolverSchedule] = {}
    blocks = re.split(r"^(\w+ \d+ \w+)$", TEXT, flags=re.MULTILINE)[1:]
    for head, body in zip(blocks[::2], blocks[1::2], strict=True):
        name, evaluations, first = head.split()
        lines = body.strip().splitlines()
        times = [float(t) for line in lines if line[0] == "t" for t in line[2:].split()]
        steps = [_step(code) for line in lines if line[0] == "s" for code in line[2:].split()]
        lam = LAMBDA[name.rsplit("_", 1)[0]]
        found[name] = SolverSchedule(
            nodes=Nodes(kind="lambda", values=tuple(lam(t) for t in times)),
            steps=tuple(steps),
            first=FIRST[first],
            mean=(0.0,) if first == "average_x0" else None,
            meta={"nfe": int(evaluations)},
        )
    return found


def _step(code: str) -> SolverStep:
    match = STEP.fullmatch(code)
    assert match, code
    param, digit, low, linear, correct, other, points = match.groups()
    order = int(digit)
    full = tuple(range(-1, -order, -1))
    scale = Scale("linear", float(linear)) if linear else Scale()
    groups = [full[: int(low)] if low else full, *[full] * order][: order - 1]
    predict = Update(
        order=order,
        derivatives=tuple(Derivative(g, scale if k == 0 else Scale()) for k, g in enumerate(groups)),
    )
    corrector = None
    if other:
        group = tuple(int(p) for p in points.split(","))
        corrector = Update(order=int(other), derivatives=(Derivative(group),) * (int(other) - 1))
    elif correct:
        sets = [(1, *g) for g in groups] + [(1, *full)]
        corrector = Update(order=order + 1, derivatives=tuple(Derivative(g) for g in sets))
    return SolverStep(param=PARAM[param], predict=predict, correct=corrector)
