import contextlib
"""The checker is checked: it must let the right gradients pass, and catch each bug that is planted here."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

import nervenet
from helpers import ROOT, planted
from nervenet import SGD, gradcheck, predict, resampling, train_step
from nervenet.convolution import im2col, patches, plain, strips, winograd_1d, winograd_2d
from nervenet.engine import pooling
from nervenet.engine.paths import paths_taken
from nervenet.gradcheck import LAYER, NETWORK, check_layer, check_loss, check_network, suite, table
from nervenet.layers import (Add, BatchNorm2D, Concat, Conv2D, ConvTranspose2D, Dropout, Layer, LeakyReLU, MaxPool2D, ReLU, Sigmoid,
                             sigmoid)
from nervenet.losses import BCEWithLogitsLoss, DiceLoss, WeightedSum
from nervenet.networks import NETWORKS
from nervenet.networks.optimised_resunet import DenseAtrousConvolution, ResidualMultiKernelPooling, Stack
from nervenet.networks.refinenet import ChainedPooling, Refine
from nervenet.networks.residual import Residual, Stage
from nervenet.networks.unet import DoubleConv, Down, UNet, Up
from nervenet.resampling import Upsample2D

BUGS = {}                       # name → (class, arguments, shapes of the inputs, the gradients that are wrong)


def bug(*shapes, wrong, **arguments):
    """Register the decorated layer as a planted bug."""
    def register(broken):
        BUGS[broken.__name__] = broken, arguments, shapes, wrong
        return broken
    return register


def wrong_quantities(results):
    return {result.quantity for result in results if not result.ok}


class RemembersItsInput:
    """A mix-in for bugs that need the input in backward, whatever the right layer keeps in its cache."""

    def forward(self, x):
        self.x = x
        return super().forward(x)


@bug((2, 5, 4, 3), (2, 5, 4, 3), wrong={'da', 'db'})
class ConcatSwapsItsGradients(Concat):
    def backward(self, dy):
        return super().backward(dy)[::-1]


@bug((2, 5, 4, 3), (2, 5, 4, 2), wrong={'protocol'})
class ConcatSwapsItsGradientsOfDifferentShapes(Concat):
    def backward(self, dy):
        return super().backward(dy)[::-1]


@bug((2, 5, 4, 3), (2, 5, 4, 2), wrong={'protocol'})
class ConcatForgetsAnInput(Concat):
    def backward(self, dy):
        return super().backward(dy)[0]


@bug((2, 5, 4, 2), wrong={'dx'}, in_channels=2, out_channels=3, dtype=float)
class ConvDoesNotFlipTheKernel(Conv2D):
    def backward(self, dy):
        weight = self.params['weight']
        self.params['weight'] = weight[::-1, ::-1].copy()
        dx = super().backward(dy)
        self.params['weight'] = weight
        return dx


@bug((2, 5, 4, 2), wrong={'dweight'}, in_channels=2, out_channels=3, dtype=float)
class ConvMirrorsTheWeightGradient(Conv2D):
    def backward(self, dy):
        dx = super().backward(dy)
        self.grads['weight'] = self.grads['weight'][:, ::-1]
        return dx


@bug((2, 5, 4, 2), wrong={'dx'}, in_channels=2, out_channels=3, dtype=float)
class ConvLosesACornerOfTheInputGradient(Conv2D):
    def backward(self, dy):
        dx = super().backward(dy)
        dx[:, -1, -1] = 0
        return dx


@bug((2, 5, 4, 2), wrong={'dweight'}, in_channels=2, out_channels=3, dtype=float)
class ConvLosesACornerOfTheWeightGradient(RemembersItsInput, Conv2D):
    def backward(self, dy):
        dx, x = super().backward(dy), self.x.copy()
        x[:, 0, 0] = 0
        self.grads['weight'] = plain.weight_gradient(x, dy, self.geometry)
        return dx


@bug((2, 5, 4, 2), wrong={'dx'}, in_channels=2, out_channels=3, dtype=float)
class ConvForgetsTheSecondImage(Conv2D):
    def backward(self, dy):
        dx = super().backward(dy)
        dx[1:] = dx[:1]
        return dx


@bug((2, 6, 8, 2), wrong={'dweight'}, in_channels=2, out_channels=3, stride=2, dtype=float)
class ConvIgnoresItsStride(RemembersItsInput, Conv2D):
    def backward(self, dy):
        dx = super().backward(dy)
        self.grads['weight'] = plain.weight_gradient(self.x, dy, replace(self.geometry, stride=1))
        return dx


@bug((2, 5, 5, 2), wrong={'dx', 'dweight'}, in_channels=2, out_channels=3, stride=(1, 2), dtype=float)
class ConvSwapsItsStrides(Conv2D):
    def backward(self, dy):
        self.geometry = replace(self.geometry, stride=self.geometry.stride[::-1])
        return super().backward(numpy.ascontiguousarray(dy.swapaxes(1, 2)))


@bug((2, 7, 6, 2), wrong={'dx', 'dweight'}, in_channels=2, out_channels=3, dilation=2, dtype=float)
class ConvForgetsItsDilationInBackward(Conv2D):
    def backward(self, dy):
        self.geometry = replace(self.geometry, dilation=1, padding=1)
        return super().backward(dy)


@bug((2, 5, 4, 2), wrong={'protocol'}, in_channels=2, out_channels=3, dtype=float)
class ConvForgetsItsBiasWhereNoInputGradientIsWanted(Conv2D):
    def backward(self, dy, input_gradient=True):
        dx = super().backward(dy, input_gradient)
        if not input_gradient:
            self.grads['bias'] = 0 * self.grads['bias']
        return dx


@bug((2, 5, 4, 3), wrong={'dx'}, negative_slope=0.2)
class LeakyReLUForgetsItsSlope(LeakyReLU):
    def backward(self, dy):
        y, = self.take()
        return dy * (y > 0)


@bug((2, 5, 4, 3), wrong={'dx'}, negative_slope=0.2)
class LeakyReLUTakesItsSlopeEverywhere(LeakyReLU):
    def backward(self, dy):
        self.take()
        return self.negative_slope * dy


@bug((2, 5, 4, 2), wrong={'protocol'}, in_channels=2, out_channels=3, dtype=float)
class ConvForgetsTheBiasGradient(Conv2D):
    def backward(self, dy):
        old = self.grads['bias']
        dx = super().backward(dy)
        self.grads['bias'] = old
        return dx


@bug((2, 5, 4, 2), wrong={'protocol'}, in_channels=2, out_channels=3, dtype=float)
class ConvAddsToOldGradients(Conv2D):
    def backward(self, dy):
        old = dict(self.grads)
        dx = super().backward(dy)
        self.grads = {name: old[name] + gradient for name, gradient in self.grads.items()}
        return dx


@bug((2, 5, 4, 2), wrong={'protocol'}, in_channels=2, out_channels=3, dtype=float)
class ConvWritesIntoItsInputInBackward(RemembersItsInput, Conv2D):
    def backward(self, dy):
        dx = super().backward(dy)
        self.x[...] = dx
        return dx


@bug((2, 5, 4, 2), wrong={'protocol'}, in_channels=2, out_channels=3, dtype=float)
class ConvUpdatesItsWeights(Conv2D):
    def backward(self, dy):
        dx = super().backward(dy)
        self.params['weight'] -= 0.1 * self.grads['weight']
        return dx


@bug((2, 5, 4, 2), wrong={'protocol'}, in_channels=2, out_channels=3, dtype=float)
class ConvWritesIntoItsWeightsInForward(Conv2D):
    def forward(self, x):
        self.params['weight'] += 1
        return super().forward(x)


@bug((2, 5, 4, 2), wrong={'protocol'}, in_channels=2, out_channels=3, dtype=float)
class ConvGivesFloat32Gradients(Conv2D):
    def backward(self, dy):
        dx = super().backward(dy)
        self.grads['weight'] = self.grads['weight'].astype('float32')
        return dx


@bug((2, 5, 4, 2), wrong={'dx', 'dweight', 'dbias'}, in_channels=2, out_channels=3, dtype=float)
class ConvAddsUpInFloat32(Conv2D):
    def forward(self, x):
        return super().forward(x).astype('float32').astype(float)


@bug((2, 3, 4, 2), wrong={'dx'}, in_channels=2, out_channels=2, dtype=float)
class TransposedConvSwapsItsChannels(ConvTranspose2D):
    def backward(self, dy):
        self.params['weight'] = self.params['weight'].swapaxes(2, 3).copy()
        dx = super().backward(dy)
        self.params['weight'] = self.params['weight'].swapaxes(2, 3).copy()
        return dx


@bug((2, 3, 4, 2), wrong={'dweight'}, in_channels=2, out_channels=2, dtype=float)
class TransposedConvTakesTheWeightGradientOfAConv(ConvTranspose2D):
    def backward(self, dy):
        dx = super().backward(dy)
        self.grads['weight'] = self.grads['weight'].swapaxes(2, 3)
        return dx


@bug((2, 5, 4, 3), wrong={'dx'})
class ReLULetsEverythingPass(ReLU):
    def backward(self, dy):
        super().backward(dy)
        return dy.copy()


@bug((2, 5, 4, 3), wrong={'protocol'})
class ReLUReturnsTwoGradients(ReLU):
    def backward(self, dy):
        dx = super().backward(dy)
        return dx, dx


@bug((2, 5, 4, 3), wrong={'protocol'})
class ReLUWritesIntoDy(ReLU):
    def backward(self, dy):
        dy[...] = super().backward(dy)
        return dy


@bug((2, 5, 4, 3), wrong={'protocol'})
class ReLUWritesIntoItsInput(ReLU):
    def forward(self, x):
        numpy.maximum(x, 0, out=x)
        return super().forward(x)


@bug((2, 5, 4, 3), wrong={'protocol'})
class ReLUWritesIntoItsOutput(ReLU):
    def forward(self, x):
        self.y = super().forward(x)
        return self.y

    def backward(self, dy):
        self.y[...] = super().backward(dy)
        return self.y


@bug((2, 5, 4, 3), wrong={'protocol'})
class ReLUKeepsItsCache(ReLU):
    def backward(self, dy):
        cache = self.cache
        dx = super().backward(dy)
        self.cache = cache
        return dx


@bug((2, 5, 4, 3), wrong={'dx'})
class SigmoidForgetsAFactor(RemembersItsInput, Sigmoid):
    def backward(self, dy):
        return super().backward(dy) / sigmoid(self.x)


@bug((2, 5, 4, 3), wrong={'dx'})
class PoolingRewardsTheFirstPixel(MaxPool2D):
    def backward(self, dy):
        dx = 0 * super().backward(dy)
        dx[:, :4:2, :4:2] = dy
        return dx


@bug((2, 5, 4, 3), wrong={'dx'})
class PoolingRewardsTheWholeWindow(MaxPool2D):
    def backward(self, dy):
        dx = 0 * super().backward(dy)
        dx[:, :4, :4] = dy.repeat(2, axis=1).repeat(2, axis=2)
        return dx


@bug((2, 6, 5, 3), wrong={'dx'}, kernel_size=3, stride=1, padding=1)
class PoolingForgetsThatWindowsOverlap(MaxPool2D):
    def backward(self, dy):
        dx = super().backward(dy)
        return numpy.where(dx != 0, dy, 0)                      # each maximum gets only the window it is the centre of


@bug((2, 7, 8, 3), wrong={'dx'}, kernel_size=3, stride=2)
class PoolingSwapsItsAxes(MaxPool2D):
    def backward(self, dy):
        return super().backward(dy)[:, ::-1]


@bug((2, 5, 4, 3), (2, 5, 4, 3), wrong={'db'})
class AddForgetsAnInput(Add):
    def backward(self, dy):
        dx = super().backward(dy)
        return dx[0], 0 * dx[1]


@bug((2, 5, 4, 3), (1, 5, 4, 3), wrong={'protocol'})
class StackSwapsItsInputs(Stack):
    def backward(self, dy):
        return super().backward(dy)[::-1]


@bug((2, 4, 5, 3), wrong={'dx'}, scale_factor=2, mode='bilinear')
class BilinearReadsBack(Upsample2D):
    """Not the adjoint: the gradient is read at the centres, not gathered from all that a pixel went into."""
    def backward(self, dy):
        super().backward(dy)
        return dy[:, ::2, ::2]


@bug((2, 4, 5, 3), wrong={'dx'}, scale_factor=(3, 2), mode='nearest')
class NearestTakesTheMean(Upsample2D):
    def backward(self, dy):
        return super().backward(dy) / 6


@bug((2, 4, 5, 3), wrong={'dx'}, scale_factor=2, mode='bilinear')
class BilinearTransposesOneAxisOnly(Upsample2D):
    def backward(self, dy):
        return super().backward(dy[:, :, ::-1])


@bug((2, 5, 4, 3), wrong=set(), channels=3, dtype=float)
class BatchNormInOtherWords(RemembersItsInput, BatchNorm2D):
    """Not a bug: the right gradient, of which the next three forget a part."""

    uses_mean = uses_variance = True

    def backward(self, dy):
        super().backward(dy)
        scale = 1 / numpy.sqrt(self.x.var(axis=(0, 1, 2)) + self.eps)
        x_hat = (self.x - self.x.mean(axis=(0, 1, 2))) * scale
        through_mean, through_variance = dy.mean(axis=(0, 1, 2)), x_hat * (dy * x_hat).mean(axis=(0, 1, 2))
        dx_hat = dy - self.uses_mean * through_mean - self.uses_variance * through_variance
        return dx_hat * self.params['weight'] * scale


@bug((2, 5, 4, 3), wrong={'dx'}, channels=3, dtype=float)
class BatchNormForgetsTheMean(BatchNormInOtherWords):
    uses_mean = False


@bug((2, 5, 4, 3), wrong={'dx'}, channels=3, dtype=float)
class BatchNormForgetsTheVariance(BatchNormInOtherWords):
    uses_variance = False


@bug((2, 5, 4, 3), wrong={'dx'}, channels=3, dtype=float)
class BatchNormForgetsBoth(BatchNormInOtherWords):
    uses_mean = uses_variance = False


@bug((2, 5, 4, 3), wrong={'dweight'}, channels=3, dtype=float)
class BatchNormTakesTheInputForTheNormalisedInput(RemembersItsInput, BatchNorm2D):
    def backward(self, dy):
        dx = super().backward(dy)
        self.grads['weight'] = (dy * self.x).sum(axis=(0, 1, 2))
        return dx


@bug((2, 5, 4, 3), wrong={'dx'}, p=0.4, rng=numpy.random.default_rng(1))
class DropoutForgetsItsMask(Dropout):
    def backward(self, dy):
        super().backward(dy)
        return dy.copy()


@bug((2, 5, 4, 3), wrong={'dx'}, p=0.4, rng=numpy.random.default_rng(1))
class DropoutForgetsItsScale(Dropout):
    def backward(self, dy):
        return super().backward(dy) * (1 - self.p)


@bug((2, 5, 4, 2), (2, 5, 4, 2), wrong={'dlogits'})
class DiceTakesTheSizeForAConstant(DiceLoss):
    def backward(self):
        p, y, overlap, extent, _ = self.take()
        return -2 * y / extent / overlap.size * p * (1 - p)


@bug((2, 5, 4, 2), (2, 5, 4, 2), wrong={'dlogits'})
class DiceForgetsTheMeanOverChannels(DiceLoss):
    def backward(self):
        return 2 * super().backward()


@bug((2, 5, 4, 2), (2, 5, 4, 2), wrong={'dlogits'})
class DiceForgetsTheSigmoid(DiceLoss):
    def backward(self):
        p = self.cache[0]
        return super().backward() / (p * (1 - p))


@bug((2, 5, 4, 1), (2, 5, 4, 1), wrong={'dlogits'})
class BCEForgetsTheMean(BCEWithLogitsLoss):
    def backward(self):
        logits, y, _ = self.take()
        return sigmoid(logits) - y


@bug((2, 5, 4, 1), (2, 5, 4, 1), wrong={'dlogits'}, weighted_losses=[(1.0, DiceLoss()), (0.5, BCEWithLogitsLoss())])
class WeightedSumForgetsItsWeights(WeightedSum):
    def backward(self):
        return sum(loss.backward() for loss in self.children.values())


def check_bug(layer, shapes, rng, methods):
    inputs = [rng.choice([-1, 1], shape) * (0.1 + rng.permutation(numpy.prod(shape)).reshape(shape) / 50)
              for shape in shapes]             # distinct and away from 0
    if isinstance(layer, (DiceLoss, BCEWithLogitsLoss, WeightedSum)):
        return check_loss(layer, inputs[0], (inputs[1] > 0.8).astype(float), rng=rng, methods=methods)
    return check_layer(layer, *inputs, rng=rng, methods=methods)


@pytest.mark.parametrize('method', LAYER)
@pytest.mark.parametrize('name', BUGS)
def test_planted_bug_is_caught(name, method, rng):
    broken, arguments, shapes, wrong = BUGS[name]
    assert wrong_quantities(check_bug(broken(**arguments), shapes, rng, {method: LAYER[method]})) == wrong


@pytest.mark.parametrize('method', LAYER)
@pytest.mark.parametrize('name', BUGS)
def test_same_layer_without_its_bug_passes(name, method, rng):
    broken, arguments, shapes, _ = BUGS[name]
    right = next(base for base in broken.__mro__ if base.__module__.startswith('nervenet'))
    assert wrong_quantities(check_bug(right(**arguments), shapes, rng, {method: LAYER[method]})) == set()


@pytest.mark.parametrize('method', LAYER)
@pytest.mark.parametrize('quantity', ['x', 'weight', 'bias'])
@pytest.mark.parametrize('kind', [Conv2D, ConvTranspose2D, BatchNorm2D])
def test_a_gradient_off_by_a_thousandth_is_caught(kind, quantity, method, rng):
    class Broken(kind):
        def backward(self, dy):
            dx = super().backward(dy)
            if quantity == 'x':
                return dx * 1.001
            self.grads[quantity] = self.grads[quantity] * 1.001
            return dx

    layer = Broken(3, dtype=float) if kind is BatchNorm2D else Broken(3, 2, rng=rng, dtype=float)
    results = check_layer(layer, rng.standard_normal((2, 3, 4, 3)), rng=rng, methods={method: LAYER[method]})
    assert wrong_quantities(results) == {'d' + quantity}


def test_a_gradient_added_up_in_float32_is_caught_by_the_complex_step(rng):
    """Its error of 1e-8 is below what finite differences can tell."""
    class Broken(Conv2D):
        def backward(self, dy):
            dx = super().backward(dy)
            self.grads['weight'] = self.grads['weight'].astype('float32').astype(float)
            return dx

    results = check_layer(Broken(2, 3, rng=rng, dtype=float), rng.standard_normal((2, 5, 4, 2)), rng=rng)
    assert {(result.quantity, result.method) for result in results if not result.ok} == {('dweight', 'complex step')}


def test_rules_at_kinks_are_checked(rng):
    class LastMaximum(MaxPool2D):
        def backward(self, dy):
            return super().backward(dy)[:, ::-1, ::-1]                                      # for equal values

    class AllMaxima(MaxPool2D):
        def backward(self, dy):
            super().backward(dy)
            return dy.repeat(k, axis=1).repeat(k, axis=2)                                   # for equal values

    class PassesAtZero(RemembersItsInput, ReLU):
        def backward(self, dy):
            super().backward(dy)
            return dy * (self.x >= 0)

    for k in (2, 3):
        assert gradcheck.check_pooling_of_equal_values(MaxPool2D(k), rng).ok
        assert not gradcheck.check_pooling_of_equal_values(LastMaximum(k), rng).ok
        assert not gradcheck.check_pooling_of_equal_values(AllMaxima(k), rng).ok
    assert gradcheck.check_relu_at_zero(ReLU(), rng).ok
    assert not gradcheck.check_relu_at_zero(PassesAtZero(), rng).ok


def network(rng, norm='batch', dropout=0.0, dtype=float):
    return UNet(2, 1, base_channels=2, depth=2, norm=norm, dropout=dropout, input_mean=0.4, input_std=0.2, rng=rng,
                dtype=dtype)


def forget_the_skips(layer, dy, backward):
    dx, dskip = backward(layer, dy)
    return dx, 0 * dskip


def swap_the_joined(layer, dy, backward):
    return backward(layer, dy)[::-1]


def scale_one_gradient(layer, dy, backward):
    dx = backward(layer, dy)
    if layer.params['weight'].shape == (3, 3, 8, 8):            # downs.1.conv2 alone
        layer.grads['weight'] = layer.grads['weight'] * 1.001
    return dx


def forget_the_bias(layer, dy, backward):
    dx = backward(layer, dy)
    layer.grads['bias'] = 0 * layer.grads['bias']
    return dx


def forget_the_mask(layer, dy, backward):
    backward(layer, dy)
    return dy


def forget_the_deviation(layer, dy, backward):
    return backward(layer, dy) * layer.config['input_std']


@pytest.mark.parametrize('method', NETWORK)
@pytest.mark.parametrize('norm', ['batch', None])
@pytest.mark.parametrize('kind, broken, wrong, right', [
    (Up, forget_the_skips, {'dx', 'stem.conv1.dweight', 'downs.0.conv2.dweight'},
     {'downs.1.conv1.dweight', 'ups.0.upconv.dbias'}),
    (Concat, swap_the_joined, {'dx', 'stem.conv2.dweight', 'ups.1.upconv.dweight', 'ups.0.conv1.dweight'},
     {'ups.1.conv1.dweight'}),
    (Conv2D, scale_one_gradient, {'downs.1.conv2.dweight'}, {'dx', 'downs.1.conv1.dweight', 'ups.0.upconv.dweight'}),
    (ConvTranspose2D, forget_the_bias, {'ups.0.upconv.dbias', 'ups.1.upconv.dbias'}, {'dx', 'ups.0.upconv.dweight'}),
    (Dropout, forget_the_mask, {'dx', 'downs.1.conv2.dweight'}, {'ups.0.upconv.dweight'}),
    (UNet, forget_the_deviation, {'dx'}, {'stem.conv1.dweight'}),
])
def test_bug_planted_in_a_network_is_caught(kind, broken, wrong, right, norm, method, rng, monkeypatch):
    backward = kind.backward
    monkeypatch.setattr(kind, 'backward', lambda layer, dy, **options: broken(layer, dy, lambda *inputs: backward(*inputs, **options)))
    model = network(rng, norm, dropout=0.3)
    with nervenet.plain() if kind is Concat else contextlib.nullcontext():                  # joins are left out otherwise
        results = check_network(model, rng.random((2, 5, 9, 2)), rng=rng, methods={method: NETWORK[method]})
    assert wrong <= wrong_quantities(results)
    assert not right & wrong_quantities(results)


def forget_the_way_round(layer, dy, backward):
    add, layer.add.backward = layer.add.backward, lambda dy: tuple(0 * part if i == 0 else part for i, part in enumerate(add(dy)))
    try:
        return backward(layer, dy)
    finally:
        del layer.add.backward


def forget_the_links(layer, dy, backward):
    return forget_the_way_round(layer, dy, backward)


def forget_what_is_below(layer, dy, backward):
    dx = backward(layer, dy)
    return (dx[0], 0 * dx[1]) if isinstance(dx, tuple) else dx


def forget_the_last_block(layer, dy, backward):
    layer.blocks, blocks = layer.blocks[:-1], layer.blocks
    try:
        return backward(layer, dy)
    finally:
        layer.blocks = blocks


@pytest.mark.parametrize('name, kind, broken, wrong, right', [
    ('resunet', Residual, forget_the_way_round, {'dx', 'stem.conv1.dweight'}, {'head.dweight', 'ups.1.block.conv2.dweight'}),
    ('resnet', Residual, forget_the_way_round, {'dx', 'stem.conv.dweight', 'stem.blocks.0.conv2.dweight'}, {'head.dweight', 'ups.1.conv.dweight'}),
    ('resnet', Stage, forget_the_last_block, {'protocol'}, {'head.dweight'}),
    ('refinenet', Residual, forget_the_way_round, {'dx', 'refines.1.unit_in.conv2.dweight'}, {'head.dweight', 'refines.1.unit_out.conv2.dweight'}),
    ('refinenet', ChainedPooling, forget_the_links, {'dx', 'refines.1.unit_in.conv2.dweight'}, {'head.dweight', 'refines.1.pooling.convs.1.dweight'}),
    ('refinenet', Refine, forget_what_is_below, {'dx', 'refines.0.reduce.dweight'}, {'head.dweight', 'refines.1.reduce.dweight'}),
    ('optimised-resunet', DenseAtrousConvolution, forget_the_way_round, {'dx', 'downs.1.block.conv2.dweight'}, {'head.dweight', 'downs.1.dac.conv_p.dweight'}),
    ('optimised-resunet', ResidualMultiKernelPooling, lambda layer, dy, backward: 0 * backward(layer, dy),
     {'dx', 'downs.1.dac.conv1.dweight'}, {'head.dweight', 'downs.1.rmp.conv.dweight'}),
    ('optimised-resunet', Stack, lambda layer, dy, backward: tuple(0 * part if i else part for i, part in enumerate(backward(layer, dy))),
     {'dx', 'downs.1.dac.conv5.dweight'}, {'head.dweight', 'downs.1.rmp.conv.dweight'})])
def test_bug_planted_in_a_block_of_another_network_is_caught(name, kind, broken, wrong, right, rng, monkeypatch):
    model, method = NETWORKS[name](1, 1, base_channels=2, depth=2, rng=rng, dtype=float), 'complex step'
    backward = kind.backward
    monkeypatch.setattr(kind, 'backward', lambda layer, dy, **options: broken(layer, dy, lambda *inputs: backward(*inputs, **options)))
    results = check_network(model, rng.random((2, 10, 17, 1)), rng=rng, methods={method: NETWORK[method]})
    assert wrong <= wrong_quantities(results) and not right & wrong_quantities(results)


@pytest.mark.parametrize('norm', ['batch', None])
@pytest.mark.parametrize('file, old, new, wrong', [
    ('networks/fusing.py', 'relu_gradient, dx, y[block], out=dx', 'relu_gradient, dx, dx, out=dx', {'dx', 'downs.0.conv1.dweight'}),
    ('networks/fusing.py', 'in_blocks_with_sums(relu_gradient, dy, y', 'in_blocks_with_sums(relu_gradient, dy, dy',
     {'batch': {'dx', 'ups.1.norm2.dweight'}}),
    ('engine/pixelwise.py', '[out[rows], x], sums', '[out[rows], 1.001 * x], sums', {'batch': {'ups.0.norm1.dweight', 'dx'}}),
    ('convolution/winograd_1d.py', '[slice(0, split), slice(split, C_out)]', '[slice(split, C_out), slice(0, split)]',
     {'dx', 'stem.conv2.dweight'}),
    ('engine/pixelwise.py', 'return parts', 'return parts[::-1]',
     {'dx', 'stem.conv2.dweight'}),
    ('convolution/winograd_1d.py', ', product.reshape(6, -1)[:, :written], out', ', 1.001 * product.reshape(6, -1)[:, :written], out', {'ups.1.conv1.dweight'})], ids=str)
def test_bug_planted_in_a_shortcut_is_caught(file, old, new, wrong, norm, rng):
    wrong = wrong if isinstance(wrong, set) else wrong.get(norm, set())
    small = 'winograd' not in file                                                          # wider ones take other paths
    model = UNet(2, 1, base_channels=2 if small else 6, depth=2, norm=norm, rng=rng, dtype=float)
    x, method = rng.random((2, 5, 9, 2) if small else (1, 24, 28, 2)), 'finite differences'
    with planted(f'nervenet/{file}', old, new):
        results = check_network(model, x, rng=rng, methods={method: NETWORK[method]})
    assert wrong <= wrong_quantities(results)


IN_PATHS = [        # module, what is replaced in its text, by what, a layer that takes this path, the shape of its input, what then is wrong
    (winograd_2d, 'M[1, 1], bias[channels]', 'M[1, 1], bias[:some * width]', lambda **o: Conv2D(33, 140, **o), (1, 10, 13, 33),
     {'dbias'}),
    (winograd_2d, 'multiply(V, U[i][share], of', 'multiply(V, U[i][share][:1], of', lambda **o: Conv2D(33, 70, **o),
     (4, 21, 26, 33), {'dx', 'dweight'}),
    (winograd_2d, 'matrix, weight = TURNED_G, weight', 'matrix, weight = G, weight', lambda **o: Conv2D(34, 40, **o), (1, 10, 13, 34), {'dx'}),
    (winograd_2d, 'piece], taps', 'piece], 1.001 * taps', lambda **o: Conv2D(33, 70, **o), (4, 21, 26, 33), {'dweight'}),
    (strips, 'for strip in strips[1:]:', 'for strip in strips[2:]:', lambda **o: Conv2D(4, 5, **o), (2, 96, 90, 4), {'dweight'}),
    (strips, 'numpy.add, total[rows], other', 'numpy.add, 0 * total[rows], other', lambda **o: Conv2D(4, 5, **o), (2, 96, 90, 4), {'dweight'}),
    (strips, 'numpy.add.reduce, terms', 'numpy.add.reduce, 1.001 * terms', lambda **o: Conv2D(4, 5, **o), (2, 24, 30, 4), {'dweight'}),
    (patches, 'matrices[:, pixel, :, pixel] =', 'matrices[:, 0, :, pixel] =', lambda **o: Conv2D(3, 1, 1, **o), (2, 4, 6, 3), {'dx'}),
    (im2col, 'product, bias[out]', 'product, bias[:len(bias[out])]', lambda **o: Conv2D(140, 260, **o), (2, 3, 4, 140), {'dbias'}),
    (im2col, 'dy[images], weight[:, :, channels]', 'dy[images], weight[:, :, :len(weight[0, 0, channels])]', lambda **o: Conv2D(140, 260, **o),
     (1, 3, 4, 140), {'dx'}),
    (im2col, '(b * DH, c * DW, d, a, b * SH, c * SW)', '(b, c * DW, d, a, b * SH, c * SW)', lambda **o: Conv2D(2, 3, dilation=2, **o),
     (2, 7, 6, 2), {'dx', 'dweight'}),
    (winograd_1d, 'point = M[1].reshape', 'point = M[0].reshape',
     lambda **o: Conv2D(9, 12, **o), (2, 22, 21, 9), {'dbias'}),
    (pooling, 'dx[inputs] += share', 'dx[inputs] = share', lambda **o: MaxPool2D(3, 1, 1), (2, 8, 7, 3), {'dx'}),
    (pooling, 'dx[images] = _back(drows', 'dx[images] = 1.001 * _back(drows', lambda **o: MaxPool2D(3, 2, 1), (2, 8, 7, 3), {'dx'}),
    (resampling, 'for i in range(SH) for j in range(SW)', 'for i in range(SH) for j in range(SH)', lambda **o: Upsample2D((2, 3)), (2, 4, 5, 3), {'dx'}),
    (patches, 'repeated(bias, KH * KW * rows.shape[1])', 'numpy.repeat(bias, KH * KW * rows.shape[1])', lambda **o: ConvTranspose2D(3, 2, **o), (2, 3, 4, 3),
     {'dbias'})]


@pytest.mark.parametrize('module, old, new, make, shape, wrong', IN_PATHS, ids=lambda value: value.strip() if isinstance(value, str) else '')
def test_bug_planted_in_a_fast_path_is_caught(module, old, new, make, shape, wrong, rng):
    """By the suite's own way to measure wide layers: a few elements, and all along one direction."""
    layer, x = make(rng=rng, dtype=float), rng.standard_normal(shape)
    method = 'finite differences'                                       # which are measured on the fast path itself
    measure = dict(methods={method: gradcheck.WIDE[method]}, directions=gradcheck.some_elements)
    assert wrong_quantities(check_layer(layer, x, rng=numpy.random.default_rng(1), **measure)) == set()
    with planted(Path(module.__file__).relative_to(ROOT), old, new):
        assert wrong_quantities(check_layer(layer, x, rng=numpy.random.default_rng(1), **measure)) & wrong


def test_everything_passes_and_every_path_that_a_network_of_the_examples_takes_is_among_it(rng):
    with paths_taken() as checked:
        results = [result for results in suite(numpy.random.default_rng(1)) for result in results]
    assert [result for result in results if not result.ok] == []
    assert {result.method for result in results} == {'finite differences', 'complex step', 'rule'}
    with paths_taken() as used:
        for kind, base_channels, size, batch, norm in ((UNet, 16, (96, 128), 8, 'batch'), (UNet, 32, (96, 128), 4, None), (UNet, 64, (128, 128), 1, 'batch'),
                                                       *((kind, 16, (96, 128), 2, norm) for kind in NETWORKS.values() for norm in ('batch', None))):
            model = kind(base_channels=base_channels, norm=norm, rng=rng)
            x = rng.random((batch, *size, 1), dtype='float32')
            train_step(model, DiceLoss(), SGD(model.parameters(), 0.1), x, (x > 0.5).astype('float32'))
            predict(model, x)
    assert used <= checked and {'winograd_1d', 'winograd_2d', 'im2col', 'patches', 'strips summed in groups'} <= used


def test_suite_knows_every_layer_and_loss(monkeypatch):
    checked = set()
    monkeypatch.setattr(gradcheck, 'check', lambda layer, *rest: checked.add(type(layer)))
    for _ in suite(numpy.random.default_rng(0)):
        pass
    exported = {value for value in vars(nervenet).values() if isinstance(value, type) and issubclass(value, Layer)}
    assert checked >= exported - {Layer, DoubleConv, Down, Up}      # the last three are parts of the U-Net


def test_command_prints_a_table_and_succeeds():
    result = subprocess.run([sys.executable, '-m', 'nervenet.gradcheck'], cwd=Path(__file__).parents[1],
                            capture_output=True, text=True, encoding='utf-8',
                            env={**os.environ, 'PYTHONIOENCODING': 'utf-8'})
    assert result.returncode == 0 and not result.stderr
    lines = result.stdout.splitlines()
    assert lines[1].split() == ['layer', 'quantity', 'finite', 'differences', 'complex', 'step', 'rule', 'verdict', 'computed', 'by']
    assert all(line[lines[1].index('verdict'):].split()[0] == 'ok' for line in lines[2:-1])
    assert [line.split()[-1] for line in lines if line.startswith('Conv2D 1×1  ')] == 3 * ['patches']
    assert {'ReLU', 'Concat', 'BatchNorm2D,', 'DiceLoss', 'UNet,', 'RefineNet,'} <= {line.split()[0] for line in lines[2:-1]}
    assert 'comparisons passed' in lines[-1]


def test_command_fails_and_says_where_if_a_gradient_is_wrong(monkeypatch, capsys):
    backward = Sigmoid.backward
    monkeypatch.setattr(Sigmoid, 'backward', lambda layer, dy: 2 * backward(layer, dy))
    monkeypatch.setattr(gradcheck, 'suite', lambda rng: [check_layer(layer, rng.standard_normal((2, 5, 4, 3)), rng=rng)
                                                         for layer in (Sigmoid(), BatchNorm2D(3, dtype=float))])
    assert gradcheck.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    row, = (number for number, line in enumerate(lines) if 'WRONG' in line)
    assert lines[row].startswith('Sigmoid')
    assert 'finite differences: 120 of 120 differ; worst for element (' in lines[row + 1]
    assert 'backward says' in lines[row + 2] and 'measured' in lines[row + 2]


def test_a_check_leaves_the_layer_and_the_inputs_as_they_were(rng):
    class WritesEverywhere(Conv2D):
        def forward(self, x):
            self.params['weight'] += 1
            x += 1
            return super().forward(x)

    layer, x = WritesEverywhere(2, 3, rng=rng, dtype=float), rng.standard_normal((2, 5, 4, 2))
    before = {name: value.copy() for name, value in layer.state_dict().items()} | {'x': x.copy()}
    assert 'protocol' in wrong_quantities(check_layer(layer, x, rng=rng))
    assert all(numpy.array_equal(value, before[name]) for name, value in (layer.state_dict() | {'x': x}).items())
    assert layer.cache is None


def test_float32_is_refused(rng):
    with pytest.raises(ValueError, match='Conv2D: weight is float32'):
        check_layer(Conv2D(2, 3, rng=rng), rng.standard_normal((2, 5, 4, 2)), rng=rng)
    with pytest.raises(ValueError, match='ReLU: x is float32'):
        check_layer(ReLU(), rng.standard_normal((2, 5, 4, 2)).astype('float32'), rng=rng)


def test_a_layer_that_takes_no_complex_numbers_can_be_checked_by_finite_differences_alone(rng):
    class Absolute(Layer):
        factor = 1

        def forward(self, x):
            self.keep(numpy.sign(x.real))
            return numpy.abs(x)

        def backward(self, dy):
            return self.factor * dy * self.take()[0]

    x = rng.choice([-1, 1], (2, 3, 4, 1)) * (0.1 + rng.random((2, 3, 4, 1)))
    results = check_layer(Absolute(), x, rng=rng, methods={'finite differences': LAYER['finite differences']})
    assert [(result.quantity, result.method, result.ok) for result in results] == [('dx', 'finite differences', True)]
    result, = check_layer(Absolute(), x, rng=rng, methods={'complex step': LAYER['complex step']})
    assert not result.ok


def test_a_gradient_of_exactly_zero_is_no_false_alarm(rng):
    class Block(Layer):
        """A convolution with a bias that the batch norm behind it takes away again."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm = Conv2D(2, 3, rng=rng, dtype=float), BatchNorm2D(3, dtype=float)
            self.children = {'conv': self.conv, 'norm': self.norm}

        def forward(self, x):
            return self.norm.forward(self.conv.forward(x))

        def backward(self, dy):
            return self.conv.backward(self.norm.backward(dy))

    class Broken(Block):
        def backward(self, dy):
            dx = super().backward(dy)
            self.conv.grads['bias'] = dy.sum(axis=(0, 1, 2))
            return dx

    x = rng.standard_normal((2, 5, 4, 2))
    for check in (check_layer, check_network):
        assert wrong_quantities(check(Block(), x, rng=rng)) == set()
        assert wrong_quantities(check(Broken(), x, rng=rng)) == {'conv.dbias'}


def test_inputs_are_named_even_if_forward_does_not(rng):
    class Product(Layer):
        def forward(self, *inputs):
            self.keep(*inputs)
            return inputs[0] * inputs[1]

        def backward(self, dy):
            a, b = self.take()
            return dy * b, dy * a

    results = check_layer(Product(), rng.standard_normal((2, 3)), rng.standard_normal((2, 3)), rng=rng)
    assert [result.quantity for result in results if result.ok] == 2 * ['dinput0'] + 2 * ['dinput1']


def test_a_gradient_of_nan_is_wrong(rng):
    class NotANumber(ReLU):
        def backward(self, dy):
            return super().backward(dy) + numpy.where(dy == dy[0, 0, 0, 0], numpy.nan, 0)

    assert wrong_quantities(check_layer(NotANumber(), rng.standard_normal((2, 3, 4, 1)), rng=rng)) == {'dx'}


def test_detail_names_the_worst_element():
    result = gradcheck.compare('Conv2D', 'dx', 'complex step', [1, 2, 4, 8], [1, 2.5, 4.1, 8], 1e-7, 'abcd')
    assert result.detail == '2 of 4 differ; worst for b: backward says 2, measured 2.5' and result.error == 0.5 / 8


def test_random_direction_leans_towards_the_gradient(rng):
    for _ in range(100):
        gradient = rng.standard_normal((3, 4, 5)) * 1e3
        (_, direction), = gradcheck.one_random_direction(gradient, rng)
        length, along = numpy.linalg.norm(direction), abs((gradient * direction).sum()) / numpy.linalg.norm(gradient)
        assert 1 < length < 1.3 and 60**-0.5 < along < 1
    (_, direction), = gradcheck.one_random_direction(numpy.zeros((3, 4)), rng)
    assert numpy.linalg.norm(direction) == pytest.approx(1)


def test_table_has_one_line_per_gradient_and_details_only_of_wrong_ones():
    results = [gradcheck.Result('Conv2D', 'dx', 'finite differences', 1e-9, 1e-7, 'hidden'),
               gradcheck.Result('Conv2D', 'dx', 'complex step', 2e-3, 1e-11, '1 of 9 differ', frozenset(['strips', 'im2col'])),
               gradcheck.Result('ReLU', 'protocol', '', numpy.inf, 0, 'dy was written into')]
    assert table(results).splitlines() == [
        'layer   quantity  finite differences  complex step  verdict  computed by',
        'Conv2D  dx        1.0e-09             2.0e-03       WRONG    im2col, strips',
        '    complex step: 1 of 9 differ',
        'ReLU    protocol                                    WRONG',
        '    protocol: dy was written into']


def test_a_negative_seed_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit):
        gradcheck.main(['--seed', '-1'])
    assert capsys.readouterr().err.splitlines()[-1].endswith('--seed is -1; expected 0 or more')
