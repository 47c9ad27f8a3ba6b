//! One parameter: what models hold.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::start::{Start, named};
use super::units::Home;
use crate::backend::call::{Call, Upload};
use crate::quant::{Format, QTensor};
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
    /// A quantised matrix, which the product makes dense piece by piece: the parameter that has it, since it may go and come back.
    Quantised(Param),
}

/// A parameter. Its identity stays; its value may be written, and may go and come back. Clones are the same parameter.
#[derive(Clone, Debug)]
pub struct Param(Arc<Inner>);

/// One that keeps none of it in memory.
#[derive(Clone, Debug)]
pub(super) struct WeakParam(Weak<Inner>);

impl WeakParam {
    pub fn upgrade(&self) -> Option<Param> {
        self.0.upgrade().map(Param)
    }
}

/// What is said of a parameter when it is made.
#[derive(Clone, Debug)]
pub(super) struct MadeAs {
    pub role: Role,
    pub zero_init: bool,
    pub adapter: bool,
    /// The path of the block that it is part of.
    pub block: Option<Arc<str>>,
    /// Where it is kept, where ranks share out the blocks.
    pub home: Option<Home>,
    /// How it is quantised, if it is.
    pub format: Option<Format>,
}

#[derive(Debug)]
struct Inner {
    var: VarId,
    path: String,
    dims: Vec<usize>,
    dtype: DType,
    /// That of the wider copy, where there is one on some rank.
    kept: DType,
    made_as: MadeAs,
    device: Device,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What models compute with, where it is resident.
    value: Option<Tensor>,
    /// What the value will be, where its first use brings it.
    start: Option<Start>,
    /// The same instead, where it is quantised.
    quantised: Option<Arc<QTensor>>,
    /// The same in a wider dtype, which `value` is rounded from.
    master: Option<Tensor>,
    /// The bytes of the value, or of the codes, where the host keeps them for its block: none on a device without data.
    host: Option<Vec<u8>>,
    /// What to add to the version of the value's storage, so that versions go on when the value comes back elsewhere.
    version: u64,
}

impl Param {
    /// A parameter from its value, and from the wider copy where it has one.
    pub(super) fn new(path: String, made_as: MadeAs, value: Tensor, master: Option<Tensor>) -> Self {
        let dtypes = (value.dtype(), master.as_ref().map_or(value.dtype(), Tensor::dtype));
        let (dims, device) = (value.dims().to_vec(), value.device().clone());
        Self::with(path, made_as, &dims, dtypes, &device, State { value: Some(value), master, ..State::default() })
    }

    /// One that another rank keeps. The dtypes are those that models compute with it in, and that it is kept in there.
    pub(super) fn elsewhere(
        path: String,
        made_as: MadeAs,
        dims: &[usize],
        dtypes: (DType, DType),
        device: &Device,
    ) -> Self {
        Self::with(path, made_as, dims, dtypes, device, State::default())
    }

    fn with(
        path: String,
        made_as: MadeAs,
        dims: &[usize],
        (dtype, kept): (DType, DType),
        device: &Device,
        state: State,
    ) -> Self {
        let (var, dims, device, state) = (VarId::fresh(), dims.to_vec(), device.clone(), Mutex::new(state));
        Self(Arc::new(Inner { var, path, dims, dtype, kept, made_as, device, state }))
    }

    /// One whose first use brings its value.
    pub(super) fn later(
        path: String,
        made_as: MadeAs,
        dims: &[usize],
        dtype: DType,
        device: &Device,
        start: Start,
    ) -> Self {
        Self::with(path, made_as, dims, (dtype, dtype), device, State { start: Some(start), ..State::default() })
    }

    /// A quantised matrix that is computed with in a dtype.
    pub(super) fn quantised(path: String, made_as: MadeAs, weight: QTensor, dtype: DType, device: &Device) -> Self {
        let dims = *weight.dims();
        let state = State { quantised: Some(Arc::new(weight)), ..State::default() };
        Self::with(path, made_as, &dims, (dtype, dtype), device, state)
    }

    /// One that the host keeps, as the bytes of its value or its codes.
    pub(super) fn on_host(
        path: String,
        made_as: MadeAs,
        dims: &[usize],
        dtype: DType,
        bytes: Vec<u8>,
        device: &Device,
    ) -> Self {
        Self::with(path, made_as, dims, (dtype, dtype), device, State { host: Some(bytes), ..State::default() })
    }

    pub(super) fn downgrade(&self) -> WeakParam {
        WeakParam(Arc::downgrade(&self.0))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, after the value came that its first use brings. It comes without the lock, since a thread that waits inside rayon may run
    /// another task, which asks for the same parameter: the first one stays.
    fn begun(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.lock();
        let Some(start) = state.start.clone() else { return Ok(state) };
        drop(state);
        let value = start.value(self.path(), self.dims(), self.dtype(), self.device());
        let value = value.map_err(|error| named(self.path(), error))?;
        let mut state = self.lock();
        if state.start.take().is_some() {
            state.value = Some(value);
        }
        Ok(state)
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

    /// The dtype that it is trained and saved in: that of the wider copy where there is one, on this rank or another.
    pub fn kept_dtype(&self) -> DType {
        self.0.kept
    }

    /// Where it is computed with.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Whether it is trained.
    pub fn role(&self) -> Role {
        self.0.made_as.role
    }

    /// Whether DiT starts it at zero (Peebles and Xie 2022, adaLN-Zero): what makes shifts, scales and gates, and the output
    /// projection. A new model adds nothing to its residual stream then, and predicts zero.
    pub fn zero_init(&self) -> bool {
        self.0.made_as.zero_init
    }

    /// Whether it is part of an adapter, and none of the model's own.
    pub fn is_adapter(&self) -> bool {
        self.0.made_as.adapter
    }

    /// The path of the block that it is part of: a unit of what ranks share out. None of an adapter's.
    pub fn block(&self) -> Option<&str> {
        self.0.made_as.block.as_deref()
    }

    /// How it is quantised, if it is.
    pub fn format(&self) -> Option<Format> {
        self.0.made_as.format
    }

    /// Where it is kept, where ranks share out the blocks.
    pub(crate) fn home(&self) -> Option<&Home> {
        self.0.made_as.home.as_ref()
    }

    /// Whether this rank keeps it: where ranks share out the blocks, one rank does, and the others have it while its block is
    /// computed with.
    pub fn is_here(&self) -> bool {
        self.home().is_none_or(Home::is_own)
    }

    /// Sees that its block is there.
    fn arrive(&self) -> Result<()> {
        self.home().map_or(Ok(()), |home| home.units.arrive(home.unit))
    }

    /// The variable of its gradient; nothing where it is frozen.
    pub fn var(&self) -> Option<VarId> {
        (self.0.made_as.role == Role::Trained).then_some(self.0.var)
    }

    /// What a product takes.
    ///
    /// # Errors
    /// When it is not resident.
    pub fn operand(&self) -> Result<Operand> {
        match self.format() {
            Some(_) => Ok(Operand::Quantised(self.clone())),
            None => self.value().map(Operand::Dense),
        }
    }

    /// The codes, where it is quantised.
    ///
    /// # Errors
    /// When it is not, or not resident.
    pub fn codes(&self) -> Result<Arc<QTensor>> {
        self.arrive()?;
        self.lock().quantised.clone().ok_or_else(|| self.absent())
    }

    /// What models compute with; what is quantised is made dense. Operations on it are recorded by themselves: see
    /// [`crate::tape`].
    ///
    /// # Errors
    /// When it is not resident.
    pub fn value(&self) -> Result<Tensor> {
        self.arrive()?;
        let state = self.begun()?;
        let (value, quantised) = (state.value.clone(), state.quantised.clone());
        drop(state);
        let value = match quantised {
            Some(weight) => weight.dequantise(self.dtype())?,
            None => value.ok_or_else(|| self.absent())?,
        };
        Ok(value.tracked(self.var(), None).of_param(self.clone()))
    }

    /// The value that lies here, without those of its block; no variable.
    pub(crate) fn resident(&self) -> Result<Tensor> {
        self.begun()?.value.as_ref().map(Tensor::detach).ok_or_else(|| self.absent())
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
    /// When it is not resident, or another rank keeps it.
    pub fn kept(&self) -> Result<Tensor> {
        if !self.is_here() {
            return Err(self.absent());
        }
        if self.home().is_some_and(Home::is_host) {
            self.arrive()?;
        }
        let state = self.begun()?;
        let (value, quantised) = (state.master.clone().or_else(|| state.value.clone()), state.quantised.clone());
        drop(state);
        match quantised {
            Some(weight) => weight.dequantise(self.dtype()),
            None => value.ok_or_else(|| self.absent()),
        }
    }

    /// Overwrites the value, and the wider copy. Where ranks share out the blocks, all ranks call it, and the one that keeps the
    /// parameter writes.
    ///
    /// # Errors
    /// When `value` has another shape, or the parameter is not resident.
    pub fn copy_from(&self, value: &Tensor) -> Result<()> {
        if let Some(home) = self.home() {
            home.units.forget()?;
            if !home.is_own() {
                return Ok(());
            }
        }
        if value.dims() != self.dims() {
            return Err(Error::shape("copy_from", format!("{:?}", self.dims()), value.dims()));
        }
        let mut state = self.lock();
        if let Some(host) = &mut state.host {
            *host = host_bytes(value, self.format(), self.dtype())?;
            state.version = state.version.wrapping_add(1);
            return Ok(());
        }
        if let Some(weight) = &mut state.quantised {
            *weight = Arc::new(QTensor::quantise(value, weight.format(), self.device())?);
            state.version = state.version.wrapping_add(1);
            return Ok(());
        }
        drop(state);
        let kept = self.kept()?;
        kept.copy_from(value)?;
        match self.master() {
            Some(master) => self.resident()?.copy_from(&master),
            None => Ok(()),
        }
    }

    /// Takes the value away, to keep it elsewhere until [`Param::provide`]; a recording that saved the parameter goes on
    /// when it is back.
    ///
    /// # Errors
    /// When it is not resident.
    pub fn release(&self) -> Result<Tensor> {
        let mut state = self.begun()?;
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

    /// What others are given of it: the value, or the codes as words.
    pub(super) fn to_give(&self) -> Result<Tensor> {
        let state = self.lock();
        match &state.quantised {
            Some(weight) => Ok(weight.words().clone()),
            None => state.value.as_ref().map(Tensor::detach).ok_or_else(|| self.absent()),
        }
    }

    /// What comes of it from the host, without the rest of its block: a value, or codes as words.
    pub(super) fn upload(&self) -> Result<Tensor> {
        let (dims, dtype) = match (self.format(), self.dims()) {
            (Some(format), &[rows, columns]) => (vec![QTensor::words_of(format, [rows, columns])], DType::U32),
            _ => (self.dims().to_vec(), self.dtype()),
        };
        let target = Tensor::empty(&dims, dtype, self.device())?;
        if self.device().backend().has_data() {
            let state = self.lock();
            let bytes = state.host.as_ref().ok_or_else(|| self.absent())?;
            Upload { bytes, target: &target }.run()?;
        }
        Ok(target)
    }

    /// Takes what came: a value, or codes as words.
    pub(super) fn take(&self, given: &Tensor) -> Result<()> {
        match self.format() {
            Some(format) => {
                let &[rows, columns] = self.dims() else { return Err(self.absent()) };
                let weight = QTensor::from_words(format, [rows, columns], given)?;
                self.lock().quantised = Some(Arc::new(weight));
                Ok(())
            }
            None => self.provide(given),
        }
    }

    /// Lets go what came.
    pub(super) fn let_go(&self) {
        self.lock().quantised = None;
        // It may have been taken away meanwhile.
        let _ = self.release();
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
        let got = if self.is_here() { "one whose value was released" } else { "one that another rank keeps" };
        Error::argument("parameter", format!("{} in memory", self.path()), got)
    }
}

/// What the host keeps of a value.
///
/// # Errors
/// When it can't be quantised, or a device fails.
pub(super) fn host_bytes(value: &Tensor, format: Option<Format>, dtype: DType) -> Result<Vec<u8>> {
    match format {
        Some(format) => QTensor::quantise(value, format, &Device::cpu())?.words().own_bytes(),
        None => value.to_dtype(dtype)?.own_bytes(),
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
