"""A U-Net from nothing to a picture, with the training loop in plain sight.

    python examples/tiny_unet.py                    trains for some seconds, then draws tiny_unet.png

Twenty synthetic ultrasound images of ten subjects. The network learns from eight subjects, and is then shown two of their images
and those of the other two, whom it has never seen: so few images teach it what they show, and little about others.
"""

import sys

import numpy

from nervenet import Adam, BCEWithLogitsLoss, DiceLoss, UNet, WeightedSum, predict
from nervenet.images.phantom import make_frame
from nervenet.study import figures


def main():
    # The images: (N, H, W, C) float32, intensities in [0, 1]. The masks: the same shape, 0 is background and 1 is nerve.
    frames = [make_frame(subject, index, size=(48, 64)) for subject in range(1, 11) for index in (1, 2)]
    images = numpy.stack([image for image, mask in frames])[..., None].astype('float32') / 255
    masks = numpy.stack([mask for image, mask in frames])[..., None].astype('float32')
    train_images, train_masks = images[:16], masks[:16]

    # The network, what it minimises, and how.
    model = UNet(base_channels=8, depth=3, input_mean=float(train_images.mean()), input_std=float(train_images.std()),
                 rng=numpy.random.default_rng(0))
    loss = WeightedSum([(1.0, DiceLoss()), (1.0, BCEWithLogitsLoss())])
    optimizer = Adam(model.parameters(), learning_rate=0.01)

    rng = numpy.random.default_rng(1)
    for epoch in range(1, 31):
        values = []
        for batch in rng.permutation(16).reshape(4, 4):                 # each image once, four at a time, in random order
            logits = model.forward(train_images[batch])                 # (4, 48, 64, 1)
            values.append(loss.forward(logits, train_masks[batch]))
            dlogits = loss.backward()                                   # how the loss changes with each logit
            model.backward(dlogits)                                     # how it changes with each parameter
            optimizer.step(model.gradients())                           # one step downhill
        if epoch % 5 == 0 or epoch == 1:
            print(f'epoch {epoch:2}   loss {numpy.mean(values):7.4f}', flush=True)

    shown = [0, 8, *range(16, 20)]
    probabilities = predict(model, images[shown])                       # (6, 48, 64, 1)
    cases = [{'label': 'learned from' if i < 16 else 'new', 'image': images[i, :, :, 0], 'truth': masks[i, :, :, 0],
              'prediction': probability[:, :, 0] > 0.5} for i, probability in zip(shown, probabilities)]
    figures.save(figures.predictions(cases), 'tiny_unet.png')
    print('images, true and predicted nerve: tiny_unet.png')


if __name__ == '__main__':
    try:
        main()
    except OSError as error:
        sys.exit(f'tiny_unet.py: {error}')
