//! One parameter: what models hold.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::quant::QTensor;
use crate::{DType, Device, Error, Result, Tensor, VarId};

/// What becomes of a parameter in training.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// It gets a gradient, and an optimiser updates it.
    Trained,
    /// It stays as it is: it is no variable, and costs neither a gradient nor an optimiser's state, nor an input that only its
    /// gradient would read.
    Frozen,
}

/// What a product takes of a parameter.
#[derive(Clone, Debug)]
pub enum Operand {
    /// A tensor.
    Dense(Tensor),
    /// A quantised matrix, which the product makes dense piece by piece.
    Quantised(Arc<QTensor>),
}

/// A parameter. Its identity stays; its value may be written, and may go and come back. Clones are the same parameter.
#[derive(Clone, Debug)]
pub struct Param(Arc<Inner>);

/// What is said of a parameter when it is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct MadeAs {
    pub role: Role,
    pub zero_init: bool,
    pub adapter: bool,
}

#[derive(Debug)]
struct Inner {
    var: VarId,
    path: String,
    dims: Vec<usize>,
    dtype: DType,
    role: Role,
    zero_init: bool,
    adapter: bool,
    device: Device,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What models compute with, where it is resident.
    value: Option<Tensor>,
    /// The same instead, where it is quantised.
    quantised: Option<Arc<QTensor>>,
    /// The same in a wider dtype, which `value` is rounded from.
    master: Option<Tensor>,
    /// What to add to the version of the value's storage, so that versions go on when the value comes back elsewhere.
    version: u64,
}

impl Param {
    /// A parameter from its value, and from the wider copy where it has one.
    pub(super) fn new(path: String, made_as: MadeAs, value: Tensor, master: Option<Tensor>) -> Self {
        let MadeAs { role, zero_init, adapter } = made_as;
        Self(Arc::new(Inner {
            var: VarId::fresh(),
            path,
            dims: value.dims().to_vec(),
            dtype: value.dtype(),
            role,
            zero_init,
            adapter,
            device: value.device().clone(),
            state: Mutex::new(State { value: Some(value), quantised: None, master, version: 0 }),
        }))
    }

    /// A quantised matrix that is computed with in a dtype.
    pub(super) fn quantised(path: String, made_as: MadeAs, weight: QTensor, dtype: DType, device: &Device) -> Self {
        let MadeAs { role, zero_init, adapter } = made_as;
        let state = State { value: None, quantised: None, master: None, version: 0 };
        Self(Arc::new(Inner {
            var: VarId::fresh(),
            path,
            dims: weight.dims().to_vec(),
            dtype,
            role,
            zero_init,
            adapter,
            device: device.clone(),
            state: Mutex::new(State { quantised: Some(Arc::new(weight)), ..state }),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its name: diffusers' key in checkpoints.
    pub fn path(&self) -> &str {
        &self.0.path
    }

    /// Its sizes.
    pub fn dims(&self) -> &[usize] {
        &self.0.dims
    }

    /// Size of one axis.
    ///
    /// # Errors
    /// When there is no such axis.
    pub fn dim(&self, axis: usize) -> Result<usize> {
        let size = self.dims().get(axis).copied();
        size.ok_or_else(|| Error::argument("dim", format!("an axis of {}, {:?}", self.path(), self.dims()), axis))
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.dims().iter().product()
    }

    /// The dtype that models compute with it in.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// Where it is computed with.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Whether it is trained.
    pub fn role(&self) -> Role {
        self.0.role
    }

    /// Whether DiT starts it at zero (Peebles and Xie 2022, adaLN-Zero): what makes shifts, scales and gates, and the output
    /// projection. A new model adds nothing to its residual stream then, and predicts zero.
    pub fn zero_init(&self) -> bool {
        self.0.zero_init
    }

    /// Whether it is part of an adapter, and none of the model's own.
    pub fn is_adapter(&self) -> bool {
        self.0.adapter
    }

    /// The variable of its gradient; nothing where it is frozen.
    pub fn var(&self) -> Option<VarId> {
        (self.0.role == Role::Trained).then_some(self.0.var)
    }

    /// What a product takes.
    ///
    /// # Errors
    /// When it is not resident.
    pub fn operand(&self) -> Result<Operand> {
        // The lock is let go before the value is asked for.
        let quantised = self.lock().quantised.clone();
        match quantised {
            Some(weight) => Ok(Operand::Quantised(weight)),
            None => self.value().map(Operand::Dense),
        }
    }

    /// What models compute with; what is quantised is made dense. Operations on it are recorded by themselves: see
    /// [`crate::tape`].
    ///
    /// # Errors
    /// When it is not resident.
    pub fn value(&self) -> Result<Tensor> {
        let state = self.lock();
        let value = match &state.quantised {
            Some(weight) => weight.dequantise(self.dtype())?,
            None => state.value.clone().ok_or_else(|| self.absent())?,
        };
        drop(state);
        Ok(value.tracked(self.var(), None).of_param(self.clone()))
    }

    /// The same in a wider dtype, which the value is rounded from, where there is such: what an optimiser updates.
    pub fn master(&self) -> Option<Tensor> {
        self.lock().master.clone()
    }

    /// Lets the wider copy go: where another rank updates the parameter, it has that.
    pub(crate) fn forget_master(&self) {
        self.lock().master = None;
    }

    /// What is trained and saved: the wider copy, or else the value. No variable.
    ///
    /// # Errors
    /// When it is not resident.
    pub fn kept(&self) -> Result<Tensor> {
        let state = self.lock();
        if let Some(weight) = &state.quantised {
            return weight.dequantise(self.dtype());
        }
        state.master.clone().or_else(|| state.value.clone()).ok_or_else(|| self.absent())
    }

    /// Overwrites the value, and the wider copy.
    ///
    /// # Errors
    /// When `value` has another shape, or the parameter is not resident.
    pub fn copy_from(&self, value: &Tensor) -> Result<()> {
        let mut state = self.lock();
        if let Some(weight) = &mut state.quantised {
            if value.dims() != self.dims() {
                return Err(Error::shape("copy_from", format!("{:?}", self.dims()), value.dims()));
            }
            *weight = Arc::new(QTensor::quantise(&value.to_device(self.device())?, weight.format())?);
            state.version = state.version.wrapping_add(1);
            return Ok(());
        }
        drop(state);
        let kept = self.kept()?;
        kept.copy_from(value)?;
        match self.master() {
            Some(master) => self.value()?.copy_from(&master),
            None => Ok(()),
        }
    }

    /// Takes the value away, to keep it elsewhere until [`Param::provide`]; a recording that saved the parameter goes on
    /// when it is back.
    ///
    /// # Errors
    /// When it is not resident.
    pub fn release(&self) -> Result<Tensor> {
        let mut state = self.lock();
        let value = state.value.take().ok_or_else(|| self.absent())?;
        state.version = state.version.wrapping_add(value.storage().version());
        Ok(value)
    }

    /// Brings the value back that [`Param::release`] took, in this or other memory of the parameter's device.
    ///
    /// # Errors
    /// When it is resident, or `value` has another shape, dtype or device.
    pub fn provide(&self, value: &Tensor) -> Result<()> {
        let fits = value.dims() == self.dims() && value.dtype() == self.dtype() && value.device().same(self.device());
        let mut state = self.lock();
        if !fits || state.value.is_some() {
            let expected = format!("{} {:?} for {}, which is not resident", self.dtype(), self.dims(), self.path());
            return Err(Error::argument("provide", expected, value));
        }
        state.version = state.version.wrapping_sub(value.storage().version());
        state.value = Some(value.detach());
        Ok(())
    }

    /// Counts writes to the value, wherever it lies.
    pub(crate) fn version(&self) -> Option<u64> {
        let state = self.lock();
        if state.quantised.is_some() {
            return Some(state.version);
        }
        Some(state.version.wrapping_add(state.value.as_ref()?.storage().version()))
    }

    fn absent(&self) -> Error {
        Error::argument("parameter", format!("{} in memory", self.path()), "one whose value was released")
    }
}

#[cfg(test)]
mod tests {
    use crate::meta::Meta;
    use crate::nn::{Init, Linear, ParamBuilder, Placement};
    use crate::{DType, Device, Error, Philox, Result, Tape, Tensor};

    #[test]
    fn a_value_may_go_and_come_back_between_forward_and_backward() -> Result<()> {
        let cpu = Device::cpu();
        let root = ParamBuilder::new(1, DType::F32, &cpu);
        let w = root.get("w", &[3, 4], Init::Normal { std: 1.0 })?;
        let x = Philox::new(2).normal(&[2, 4], &cpu)?;
        let recorded = || -> Result<_> {
            let tape = Tape::new();
            let x = tape.leaf(&x);
            let loss = crate::ops::linear(&x, &w.value()?, None)?.square()?.sum_all()?;
            Ok((tape, x, loss))
        };
        let (tape, leaf, loss) = recorded()?;
        let expected = tape.backward(&loss)?.of(&leaf).unwrap().to_vec::<f32>()?;
        // Elsewhere meanwhile.
        let (tape, leaf, loss) = recorded()?;
        let bytes = w.release()?.to_bytes()?;
        assert!(w.value().is_err() && w.release().is_err());
        w.provide(&Tensor::from_bytes(&bytes, &[3, 4], DType::F32, &cpu)?)?;
        assert_eq!(tape.backward(&loss)?.of(&leaf).unwrap().to_vec::<f32>()?, expected);
        // Not there when it is needed, or written meanwhile: errors.
        let (tape, _, loss) = recorded()?;
        let value = w.release()?;
        assert!(tape.backward(&loss).unwrap_err().to_string().contains('w'));
        w.provide(&value)?;
        assert!(w.provide(&value).is_err());
        let (tape, _, loss) = recorded()?;
        w.copy_from(&Tensor::ones(&[3, 4], DType::F32, &cpu)?)?;
        assert!(matches!(tape.backward(&loss), Err(Error::Overwritten { .. })));
        Ok(())
    }

    #[test]
    fn a_linear_layer_keeps_nothing_for_a_frozen_weight() -> Result<()> {
        for frozen in [false, true] {
            let meta = Meta::default();
            let device = meta.device();
            let placement = if frozen { Placement::frozen(DType::F32) } else { Placement::trained(DType::F32) };
            let layer = Linear::new(&ParamBuilder::with_plan(1, placement, &device), 1 << 10, 1, true)?;
            let tape = Tape::new();
            let x = tape.leaf(&Tensor::zeros(&[1, 1 << 10], DType::F32, &device)?);
            let before = meta.used();
            let loss = layer.forward(&x.mul_scalar(2.0)?)?;
            // What the layer reads lives on for the gradient of the weight alone.
            assert_eq!(meta.used() - before > 4 << 10, !frozen);
            assert_eq!(tape.backward(&loss)?.iter().count(), if frozen { 1 } else { 3 });
        }
        Ok(())
    }
}
