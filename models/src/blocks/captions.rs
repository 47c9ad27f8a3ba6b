//! Texts of different lengths side by side.

use flowtape_engine::ops::embedding;
use flowtape_engine::{Device, Error, Result, Tensor};

use super::{TOKEN, key_mask};

/// Which tokens of a batch of texts are valid, and how many places each text gets: models that take texts without padding, padded
/// by themselves to a multiple of a length, have them here as rows of one length, of which the rest is masked out.
#[derive(Clone, Debug)]
pub struct Captions {
    /// For each sample the places of its valid tokens among those of all.
    tokens: Vec<Vec<u32>>,
    /// How many places each sample has.
    lengths: Vec<usize>,
}

/// Which numbers of a mask of the tokens of texts, `[B, T]`, are not 0; nothing where there is no mask, or no data to read.
///
/// # Errors
/// When it has other sizes.
pub fn read_marks(mask: Option<&Tensor>, dims: [usize; 2]) -> Result<Option<Vec<bool>>> {
    match mask {
        Some(mask) if mask.dims() != dims => Err(Error::shape("captions", format!("a mask {dims:?}"), mask.dims())),
        Some(mask) if mask.device().backend().has_data() => {
            let marks = mask.to_vec::<f32>()?.into_iter();
            Ok(Some(marks.map(|mark| f64::from(mark.abs()) >= TOKEN).collect()))
        }
        _ => Ok(None),
    }
}

impl Captions {
    /// Of texts `[B, T, D]` and their mask `[B, T]`, 0 at padding, where there is one: it is read. Each text gets as many
    /// places as it has valid tokens, at least one, and so many more that they are a multiple of `multiple`.
    ///
    /// # Errors
    /// When the mask has another shape than the texts.
    pub fn of(text: &Tensor, mask: Option<&Tensor>, multiple: usize) -> Result<Self> {
        let (batch, len) = (text.dim(0)?, text.dim(1)?);
        // Without data nothing is known to be padding.
        let valid = read_marks(mask, [batch, len])?.unwrap_or_else(|| vec![true; batch * len]);
        let places = |sample: usize| sample * len..(sample + 1) * len;
        let of_sample = |sample| places(sample).filter(|i| valid[*i]).map(|i| i as u32).collect();
        let tokens: Vec<Vec<u32>> = (0..batch).map(of_sample).collect();
        let lengths = tokens.iter().map(|tokens| tokens.len().max(1).next_multiple_of(multiple.max(1))).collect();
        Ok(Self { tokens, lengths })
    }

    /// The places of each sample; of the first alone where all have as many.
    pub fn lengths(&self) -> &[usize] {
        match self.lengths.first() {
            Some(first) if self.lengths.iter().all(|length| length == first) => &self.lengths[..1],
            _ => &self.lengths,
        }
    }

    /// The most places that a sample has.
    pub fn width(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// The valid tokens `[B, width, D]` of texts `[B, T, D]`, in their order; what stands behind them is of no meaning.
    ///
    /// # Errors
    /// When these are other texts.
    pub fn gather(&self, text: &Tensor) -> Result<Tensor> {
        let (batch, len, dim, width) = (text.dim(0)?, text.dim(1)?, text.dim(2)?, self.width());
        let row = |tokens: &Vec<u32>| {
            let mut row = tokens.clone();
            row.resize(width, 0);
            row
        };
        let index: Vec<u32> = self.tokens.iter().flat_map(row).collect();
        let index = Tensor::from_vec(index, &[self.tokens.len(), width], text.device())?;
        embedding(&text.reshape(&[batch * len, dim])?, &index)
    }

    fn marks(&self, device: &Device, mark: impl Fn(usize, usize) -> bool) -> Result<Tensor> {
        let (samples, width) = (self.tokens.len(), self.width());
        let mark = &mark;
        let marks = (0..samples).flat_map(|b| (0..width).map(move |i| f32::from(u8::from(mark(b, i)))));
        Tensor::from_vec(marks.collect(), &[samples, width], device)
    }

    /// f32 `[B, width, 1]`: 1 at places without a token.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn padding(&self, device: &Device) -> Result<Tensor> {
        self.marks(device, |sample, i| i >= self.tokens[sample].len())?.unsqueeze(2)
    }

    /// What is added to scores so that places beyond a sample's own are not attended to: f32 `[B, 1, 1, width]`; none where all
    /// samples have as many.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn mask(&self, device: &Device) -> Result<Option<Tensor>> {
        if self.lengths().len() < 2 {
            return Ok(None);
        }
        key_mask(&self.marks(device, |sample, i| i < self.lengths[sample])?).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;

    #[test]
    fn texts_lose_their_padding_and_get_that_of_the_model() {
        let text = normal(&[2, 5, 3]);
        let mask = Tensor::from_vec(vec![0u32, 1, 1, 1, 1, 1, 0, 1, 0, 0], &[2, 5], &Device::cpu()).unwrap();
        let captions = Captions::of(&text, Some(&mask), 3).unwrap();
        assert_eq!((captions.lengths(), captions.width()), (&[6, 3][..], 6));
        let values = |x: &Tensor| x.to_vec::<f32>().unwrap();
        let (rows, all) = (values(&captions.gather(&text).unwrap()), values(&text));
        assert_eq!(rows[..12], all[3..15]);
        assert_eq!((&rows[18..21], &rows[21..24]), (&all[15..18], &all[21..24]));
        let cpu = Device::cpu();
        assert_eq!(values(&captions.padding(&cpu).unwrap()), [0., 0., 0., 0., 1., 1., 0., 0., 1., 1., 1., 1.]);
        let mask = values(&captions.mask(&cpu).unwrap().unwrap());
        assert_eq!(mask, [vec![0.0; 9], vec![f32::NEG_INFINITY; 3]].concat());
        // Texts of one length need no mask, and share their positions.
        let alike = Captions::of(&text, None, 4).unwrap();
        assert_eq!((alike.lengths(), alike.mask(&cpu).unwrap().is_none()), (&[8][..], true));
        assert!(Captions::of(&text, Some(&normal(&[2, 4])), 4).is_err());
    }
}
