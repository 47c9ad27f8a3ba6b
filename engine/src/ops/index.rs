//! Rows by index.

use crate::backend::call::{self, Call};
use crate::backend::common_device;
use crate::gradcheck::{Case, Sample};
use crate::tape::{Forward, InputGradients, Op, Saved, apply_one};
use crate::{DType, Error, Result, Tensor};

#[derive(Debug)]
struct Gather;

impl Op for Gather {
    fn name(&self) -> &'static str {
        "gather"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let (table, index) = (inputs[0].contiguous()?, inputs[1].contiguous()?);
        let dims = [&[index.numel()], &table.dims()[1..]].concat();
        let out = Tensor::empty(&dims, table.dtype(), table.device())?;
        call::Gather { table: &table, index: &index, out: &out }.run()?;
        cx.save("index", &index);
        cx.save_shape("table", &table);
        Ok(vec![out])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let (dims, dtype) = saved.shape("table")?;
        let table = Tensor::zeros(dims, dtype, grad.device())?;
        call::ScatterAdd { rows: &grad.contiguous()?, index: saved.get("index")?, out: &table }.run()?;
        out.set(0, table);
        Ok(())
    }
}

impl Tensor {
    /// The entries of `axis` that `index` (u32, one axis) names, in its order.
    ///
    /// # Errors
    /// When an index is past the end, the axis does not exist or the index is not u32.
    pub fn index_select(&self, axis: usize, index: &Self) -> Result<Self> {
        self.axis("index_select", axis)?;
        common_device("index_select", &[self, index])?;
        if index.dtype() != DType::U32 || index.rank() != 1 {
            let got = format!("{} {:?}", index.dtype(), index.dims());
            return Err(Error::argument("index_select", "an index of u32 with one axis", got));
        }
        if axis == 0 {
            return apply_one(Gather, &[self, index]);
        }
        apply_one(Gather, &[&self.transpose(0, axis)?, index])?.transpose(0, axis)
    }
}

/// Rows of a table: table `[n, d]`, index u32 of any shape, result `[.., d]`.
///
/// # Errors
/// When an index is past the end or a shape does not fit.
pub fn embedding(table: &Tensor, index: &Tensor) -> Result<Tensor> {
    let dims = [index.dims(), &table.dims()[1.min(table.rank())..]].concat();
    table.index_select(0, &index.reshape(&[index.numel()])?)?.reshape(&dims)
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[Case {
    name: "index_select and embedding",
    make: |draw| {
        let [rows, width, count] = [draw.size(1, 5), draw.size(1, 4), draw.size(1, 8)];
        let at: Vec<u32> = (0..count).map(|_| draw.size(0, rows - 1) as u32).collect();
        let columns: Vec<u32> = (0..2).map(|_| draw.size(0, width - 1) as u32).collect();
        Sample::new(vec![draw.standard(&[rows, width])?], move |xs| {
            let at = Tensor::from_slice(&at, &[count], xs[0].device())?;
            let columns = Tensor::from_slice(&columns, &[2], xs[0].device())?;
            embedding(&xs[0], &at)?.index_select(1, &columns)
        })
    },
}];
