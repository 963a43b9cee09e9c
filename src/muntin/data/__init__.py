"""Images in: decoding, transforms, the bundled digits, folders of images."""
