//! Parameters by path name: how they are made, loaded, saved and checked.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::param::{MadeAs, host_bytes};
use super::start::{Start, named};
use super::units::Home;
use super::{AdapterSpec, Init, Param, ParamPlan, Placement, Role, Units};
use crate::quant::{CodeStore, QTensor};
use crate::safetensors::{Shards, save_sharded};
use crate::{DType, Device, Error, Gradients, Philox, Result, Tensor, VarId, hash};

/// The parameters of a model, in the order in which they were made. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Params {
    all: Vec<Param>,
    places: HashMap<String, usize>,
    linears: Vec<String>,
}

impl Params {
    /// All of them.
    pub fn iter(&self) -> std::slice::Iter<'_, Param> {
        self.all.iter()
    }

    /// The parameter of that path.
    pub fn get(&self, path: &str) -> Option<&Param> {
        self.places.get(path).map(|&i| &self.all[i])
    }

    /// The paths of the linear layers, in the order in which they were made: what adapters can stand beside.
    pub fn linears(&self) -> &[String] {
        &self.linears
    }

    /// The model's own parameters: what a checkpoint of it holds.
    #[must_use]
    pub fn base(&self) -> Self {
        self.only(|param| !param.is_adapter())
    }

    /// The parameters of adapters.
    #[must_use]
    pub fn adapters(&self) -> Self {
        self.only(Param::is_adapter)
    }

    /// What ranks share out, where they share out blocks.
    pub fn units(&self) -> Option<&Arc<Units>> {
        self.iter().find_map(Param::home).map(|home| &home.units)
    }

    fn only(&self, holds: impl Fn(&Param) -> bool) -> Self {
        let mut some = Self { linears: self.linears.clone(), ..Self::default() };
        self.iter().filter(|param| holds(param)).for_each(|param| some.push(param.clone()));
        some
    }

    fn push(&mut self, param: Param) {
        self.places.insert(param.path().to_owned(), self.all.len());
        self.all.push(param);
    }

    /// Takes in one that was made.
    fn keep(&mut self, param: Param) -> Param {
        if let Some(home) = param.home() {
            home.units.add(home.unit, &param);
        }
        self.push(param.clone());
        param
    }

    /// Number of parameters.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Number of elements of all parameters.
    pub fn numel(&self) -> u64 {
        self.iter().map(|param| param.numel() as u64).sum()
    }

    /// Overwrites all parameters with a file's tensors of the same names, converted to the parameters' dtypes; the wider
    /// copies too. Where ranks share them out, each reads its own.
    ///
    /// # Errors
    /// When names or shapes differ (one error lists them all; nothing is changed then), or the file can't be read.
    pub fn load(&self, file: &Shards) -> Result<()> {
        self.check_keys(file, |_| false)?;
        self.iter().filter(|p| p.is_here()).try_for_each(|p| p.copy_from(&file.get(p.path(), p.device(), None)?))?;
        self.units().map_or(Ok(()), |units| units.forget())
    }

    /// Checks that a file has these parameters and no others, but for those that `ignored` names.
    ///
    /// # Errors
    /// One error lists all that is missing, unexpected or of another shape.
    pub fn check_keys(&self, file: &Shards, ignored: impl Fn(&str) -> bool) -> Result<()> {
        let (mut missing, mut mismatched) = (Vec::new(), Vec::new());
        for param in self.iter() {
            match file.dims(param.path()) {
                None => missing.push(param.path().to_string()),
                Some(dims) if dims != param.dims() => {
                    mismatched.push(format!("{} expected {:?}, got {dims:?}", param.path(), param.dims()));
                }
                Some(_) => {}
            }
        }
        let unexpected = file.names().filter(|n| self.get(n).is_none() && !ignored(n));
        let unexpected: Vec<String> = unexpected.map(String::from).collect();
        if missing.len() + mismatched.len() + unexpected.len() > 0 {
            return Err(Error::Keys { path: file.path().into(), missing, unexpected, mismatched });
        }
        Ok(())
    }

    /// Writes all parameters, the wider copies where there are such, to `<stem>.safetensors` of a folder, or to several files of at most about `max_bytes` with an
    /// index.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn save(&self, folder: &Path, stem: &str, max_bytes: u64) -> Result<()> {
        save_sharded(folder, stem, &self.tensors()?, &Self::text(), max_bytes)
    }

    /// All parameters by their paths, the wider copies where there are such: what [`Params::save`] writes.
    ///
    /// # Errors
    /// When a parameter is not there.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        self.iter().map(|p| Ok((p.path().to_owned(), p.kept()?))).collect()
    }

    /// The free text of a file of parameters: diffusers and transformers read this key.
    pub fn text() -> BTreeMap<String, String> {
        BTreeMap::from([("format".into(), "pt".into())])
    }

    /// Checks that every trained parameter has a gradient, but for those named in `allowed`.
    ///
    /// # Errors
    /// Names the parameters without one.
    pub fn check_gradients(&self, gradients: &Gradients, allowed: &[String]) -> Result<()> {
        self.check_reached(|var| gradients.get(var).is_some(), allowed)
    }

    /// Checks that `reached` holds for every trained parameter, but for those named in `allowed`.
    ///
    /// # Errors
    /// Names the parameters for which it does not.
    pub fn check_reached(&self, reached: impl Fn(VarId) -> bool, allowed: &[String]) -> Result<()> {
        let lacks = |p: &&Param| p.var().is_some_and(|var| !reached(var)) && !allowed.iter().any(|a| a == p.path());
        let names: Vec<String> = self.iter().filter(lacks).map(|p| p.path().into()).collect();
        if names.is_empty() { Ok(()) } else { Err(Error::MissingGradient { names }) }
    }
}

/// Makes parameters under a path. Each draws from a generator of its own, chosen by its name, so that adding one
/// changes no other.
#[derive(Clone, Debug)]
pub struct ParamBuilder {
    path: String,
    random: Philox,
    plan: Arc<dyn ParamPlan>,
    device: Device,
    file: Option<Arc<Shards>>,
    /// Whether what is made here is marked as what DiT starts at zero, and whether that is done.
    zero_init: bool,
    adaln_zero: bool,
    /// Whether what is made here is part of an adapter.
    adapter: bool,
    /// Whether what is made here is the weight of a linear layer, which may be quantised.
    quantisable: bool,
    /// Whether values come with their first use.
    lazy: bool,
    /// The path of the block that is made here.
    block: Option<Arc<str>>,
    units: Option<Arc<Units>>,
    /// Where codes are kept, and those of the file that is read.
    codes_in: Option<PathBuf>,
    codes: Option<Arc<CodeStore>>,
    made: Arc<Mutex<Params>>,
}

impl ParamBuilder {
    /// A builder at the root: all parameters are trained in `dtype`.
    pub fn new(seed: u64, dtype: DType, device: &Device) -> Self {
        Self::with_plan(seed, Placement::trained(dtype), device)
    }

    /// A builder at the root whose parameters are held as a plan decides.
    pub fn with_plan(seed: u64, plan: impl ParamPlan + 'static, device: &Device) -> Self {
        Self {
            path: String::new(),
            random: Philox::new(seed),
            plan: Arc::new(plan),
            device: device.clone(),
            file: None,
            zero_init: false,
            adaln_zero: false,
            adapter: false,
            quantisable: false,
            lazy: false,
            block: None,
            units: None,
            codes_in: None,
            codes: None,
            made: Arc::default(),
        }
    }

    /// The same builder, where the model's own parameters are a file's tensors of their names instead of starting values. What
    /// does not fit gets no memory: check [`Params::check_keys`] before use.
    #[must_use]
    pub fn reading(self, file: Arc<Shards>) -> Self {
        let codes = self.codes_in.as_ref().map(|folder| Arc::new(CodeStore::new(folder, &file)));
        Self { file: Some(file), codes, ..self }
    }

    /// The same builder, where frozen parameters are read or made when they are first used: what is never used takes no memory. Those that are
    /// quantised, or kept elsewhere, come at once.
    #[must_use]
    pub fn lazy(self) -> Self {
        Self { lazy: true, ..self }
    }

    /// The same builder, where the codes of what is read and quantised are kept in a folder, and found there the next time
    /// ([`CodeStore`]). Whoever reads all of the file ends it with [`ParamBuilder::finish_codes`].
    #[must_use]
    pub fn keeping_codes(self, folder: &Path) -> Self {
        Self { codes_in: Some(folder.into()), ..self }
    }

    /// Keeps the codes that were made: all parameters are there.
    pub fn finish_codes(&self) {
        self.codes.iter().for_each(|codes| codes.finish());
    }

    /// The same builder, where parameters of blocks are kept elsewhere: by ranks, so that what another one keeps is neither read nor made
    /// here, or by the host.
    #[must_use]
    pub fn sharing(self, units: Arc<Units>) -> Self {
        Self { units: Some(units), ..self }
    }

    /// A builder of a block, which is a unit; a block inside of another is part of that.
    pub(super) fn block(&self) -> Self {
        let block = self.block.clone().unwrap_or_else(|| self.path.as_str().into());
        Self { block: Some(block), ..self.clone() }
    }

    /// The same builder, where what DiT starts at zero ([`Param::zero_init`]) starts at zero.
    #[must_use]
    pub fn with_adaln_zero(self, on: bool) -> Self {
        Self { adaln_zero: on, ..self }
    }

    /// A builder whose parameters are what DiT starts at zero.
    #[must_use]
    pub fn zero_init(&self) -> Self {
        Self { zero_init: true, ..self.clone() }
    }

    /// Notes a linear layer of the builder's path; the adapter that the plan wants beside it.
    pub(super) fn linear(&self) -> Option<AdapterSpec> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).linears.push(self.path.clone());
        self.plan.adapter(&self.path)
    }

    /// A builder of the weight of a linear layer.
    pub(super) fn quantisable(&self) -> Self {
        Self { quantisable: true, ..self.clone() }
    }

    /// A builder of what an adapter adds: held as its specification says, and never found in the model's file.
    pub(super) fn adapter(&self, placement: Placement) -> Self {
        Self { plan: Arc::new(placement), file: None, codes: None, zero_init: false, adapter: true, ..self.clone() }
    }

    /// A number for what is drawn under a name of this path.
    pub(super) fn stream(&self, name: &str) -> u64 {
        hash::of(self.sub(name).path.as_bytes())
    }

    /// A builder one step down the path.
    #[must_use]
    pub fn sub(&self, name: impl ToString) -> Self {
        let name = name.to_string();
        let path = if self.path.is_empty() { name } else { format!("{}.{name}", self.path) };
        Self { path, ..self.clone() }
    }

    /// Where it stands.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Where the parameters lie.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The dims that a parameter has in the file that is read, where one is read: for widths that no configuration states.
    pub fn stored_dims(&self, name: &str) -> Option<&[usize]> {
        self.file.as_ref()?.dims(&self.sub(name).path)
    }

    /// Makes a parameter.
    ///
    /// # Errors
    /// When the name is taken or memory runs out.
    pub fn get(&self, name: &str, dims: &[usize], init: Init) -> Result<Param> {
        let path = self.sub(name).path;
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.get(&path).is_some() {
            return Err(Error::argument("parameter", "a new name", path));
        }
        let Placement { role, compute, master, format } = self.plan.place(&path, dims);
        let kept = master.unwrap_or(compute);
        let format = format.filter(|_| self.quantisable && role == Role::Frozen);
        let block = self.block.clone().filter(|_| !self.adapter);
        let home = self.units.as_ref().zip(block.as_ref());
        let home = home.and_then(|(units, block)| units.home(block, &path, role));
        let made_as = MadeAs { role, zero_init: self.zero_init, adapter: self.adapter, block, home, format };
        if made_as.home.as_ref().is_some_and(|home| !home.is_own()) {
            return Ok(made.keep(Param::elsewhere(path, made_as, dims, (compute, kept), &self.device)));
        }
        let init = if self.zero_init && self.adaln_zero { Init::Zeros } else { init };
        let data = self.device.backend().has_data();
        let on_host = made_as.home.as_ref().is_some_and(Home::is_host);
        if on_host && !data {
            return Ok(made.keep(Param::on_host(path, made_as, dims, compute, Vec::new(), &self.device)));
        }
        // The host quantises: what is dense lies there.
        let host = ((format.is_some() || on_host) && data).then(Device::cpu);
        let device = host.as_ref().unwrap_or(&self.device);
        let start = Start { file: self.file.clone(), init, random: self.random.clone() };
        if self.lazy && role == Role::Frozen && master.is_none() && format.is_none() && made_as.home.is_none() {
            start.check(&path)?;
            return Ok(made.keep(Param::later(path, made_as, dims, compute, &self.device, start)));
        }
        let value = || start.value(&path, dims, kept, device);
        let named = |error| named(&path, error);
        if let Some(format) = format {
            // One tensor at a time is dense.
            let lies = if on_host { device } else { &self.device };
            let weight = match (&self.codes, dims) {
                (Some(codes), &[rows, columns]) if data => {
                    codes.get(&path, (format, kept), [rows, columns], lies, value)
                }
                _ => value().and_then(|value| QTensor::quantise(&value, format, lies)),
            };
            let weight = weight.map_err(named)?;
            if on_host {
                let bytes = weight.words().own_bytes()?;
                return Ok(made.keep(Param::on_host(path, made_as, dims, compute, bytes, &self.device)));
            }
            return Ok(made.keep(Param::quantised(path, made_as, weight, compute, &self.device)));
        }
        let value = value();
        if on_host {
            let bytes = value.and_then(|value| host_bytes(&value, None, compute)).map_err(named)?;
            return Ok(made.keep(Param::on_host(path, made_as, dims, compute, bytes, &self.device)));
        }
        let both = value.and_then(|value| Ok((value.to_dtype(compute)?, value)));
        let (value, wide) = both.map_err(named)?;
        Ok(made.keep(Param::new(path, made_as, value, master.map(|_| wide))))
    }

    /// All parameters made so far, by this builder and those below it.
    pub fn params(&self) -> Params {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tape;

    fn two() -> Result<Params> {
        let root = ParamBuilder::new(1, DType::F32, &Device::cpu());
        root.sub("a").get("weight", &[2, 3], Init::Normal { std: 1.0 })?;
        root.sub("b").sub(0).get("bias", &[4], Init::Zeros)?;
        assert!(root.sub("a").get("weight", &[1], Init::Ones).is_err());
        Ok(root.params())
    }

    #[test]
    fn saved_parameters_load_and_wrong_ones_are_named() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let open = || Shards::open(folder.path(), "p");
        let (first, second) = (two()?, two()?);
        first.get("b.0.bias").unwrap().copy_from(&Tensor::ones(&[4], DType::F32, &Device::cpu())?)?;
        first.save(folder.path(), "p", u64::MAX)?;
        second.load(&open()?)?;
        assert_eq!(second.get("b.0.bias").unwrap().value()?.to_vec::<f32>()?, [1.0; 4]);
        let root = ParamBuilder::new(1, DType::F32, &Device::cpu());
        root.sub("a").get("weight", &[3, 2], Init::Ones)?;
        root.get("c", &[1], Init::Ones)?;
        let message = root.params().load(&open()?).unwrap_err().to_string();
        for part in ["missing: [c]", "unexpected: [b.0.bias]", "a.weight expected [3, 2], got [2, 3]"] {
            assert!(message.contains(part), "{message}");
        }
        assert_eq!(root.params().get("c").unwrap().value()?.to_vec::<f32>()?, [1.0]);
        Ok(())
    }

    #[test]
    fn what_is_lazy_takes_memory_with_its_first_use() -> Result<()> {
        let (cpu, meta) = (Device::cpu(), crate::meta::Meta::default());
        let lazy = |device: &Device| ParamBuilder::with_plan(1, Placement::frozen(DType::F32), device).lazy();
        let root = lazy(&meta.device());
        let (used, _unused) = (root.get("used", &[1 << 10], Init::Ones)?, root.get("unused", &[1 << 10], Init::Ones)?);
        assert_eq!((meta.used(), root.params().numel()), (0, 2 << 10));
        for _ in 0..2 {
            used.value()?;
            assert_eq!(meta.used(), 4 << 10);
        }
        // The values are those that come at once else, drawn or read.
        let eager = two()?.get("a.weight").unwrap().value()?.to_vec::<f32>()?;
        let drawn = lazy(&cpu).sub("a").get("weight", &[2, 3], Init::Normal { std: 1.0 })?;
        assert_eq!(drawn.value()?.to_vec::<f32>()?, eager);
        let bytes = crate::safetensors::to_bytes(&two()?.tensors()?, &Params::text())?;
        let reading = |bytes: Vec<u8>| -> Result<_> {
            let file = Arc::new(Shards::from(crate::safetensors::SafeTensors::from_bytes("file", bytes)?));
            Ok((lazy(&cpu).reading(file.clone()), file))
        };
        let (root, file) = reading(bytes)?;
        assert_eq!(root.sub("a").get("weight", &[2, 3], Init::Zeros)?.release()?.to_vec::<f32>()?, eager);
        // What does not fit is an error before any use.
        root.sub("b").sub(0).get("bias", &[5], Init::Zeros)?;
        root.get("c", &[1], Init::Zeros)?;
        let message = root.params().check_keys(&file, |_| false).unwrap_err().to_string();
        assert!(message.contains("missing: [c]") && message.contains("b.0.bias expected [5], got [4]"), "{message}");
        let header = br#"{"w":{"dtype":"I16","shape":[1],"data_offsets":[0,2]}}"#;
        let (root, _) = reading([&(header.len() as u64).to_le_bytes()[..], header, &[0; 2]].concat())?;
        let message = root.get("w", &[1], Init::Zeros).unwrap_err().to_string();
        assert!(message.contains("file") && message.contains("w: dtype I16"), "{message}");
        Ok(())
    }

    #[test]
    fn a_parameter_without_gradient_is_named() -> Result<()> {
        let params = two()?;
        let tape = Tape::new();
        let loss = tape.attach(&params.get("a.weight").unwrap().value()?).square()?.sum_all()?;
        let gradients = tape.backward(&loss)?;
        let error = params.check_gradients(&gradients, &[]).unwrap_err().to_string();
        assert!(error.contains("b.0.bias") && !error.contains("a.weight"), "{error}");
        params.check_gradients(&gradients, &["b.0.bias".into()])
    }

    #[test]
    fn a_plan_decides_by_path_and_frozen_parameters_are_no_variables() -> Result<()> {
        let plan = |path: &str, _: &[usize]| match path {
            "frozen" => Placement::frozen(DType::BF16),
            _ => Placement::trained(DType::BF16).with_master(DType::F32),
        };
        let root = ParamBuilder::with_plan(1, plan, &Device::cpu());
        let normal = Init::Normal { std: 1.0 };
        let (frozen, trained) = (root.get("frozen", &[4], normal)?, root.get("trained", &[4], normal)?);
        assert_eq!((frozen.role(), frozen.var(), frozen.master().is_none()), (Role::Frozen, None, true));
        assert_eq!(
            (trained.role(), trained.dtype(), trained.kept()?.dtype()),
            (Role::Trained, DType::BF16, DType::F32)
        );
        assert!(trained.var().is_some());
        let loss = Tape::new().attach(&frozen.value()?).mul(&trained.value()?)?.sum_all()?;
        let gradients = loss.tape().unwrap().backward(&loss)?;
        assert_eq!(gradients.iter().count(), 1);
        // A frozen parameter is not expected to have one.
        root.params().check_gradients(&gradients, &[])
    }

    #[test]
    fn of_a_quantised_model_one_weight_at_a_time_is_dense() -> Result<()> {
        use crate::meta::Meta;
        use crate::nn::Linear;
        use crate::quant::{FORMATS, QTensor};
        for format in FORMATS {
            let meta = Meta::default();
            let device = meta.device();
            let plan = Placement::frozen(DType::BF16).quantised(Some(format));
            let root = ParamBuilder::with_plan(1, plan, &device);
            let layers: Vec<Linear> =
                (0..8).map(|i| Linear::new(&root.sub(i), 2048, 4096, false)).collect::<Result<_>>()?;
            let (codes, dense) = (QTensor::bytes_of(format, [4096, 2048]) as u64, 2 * 4096 * 2048);
            // The shape-only device rounds up as the CPU's pool does.
            let quantised = meta.used();
            assert!(quantised >= 8 * codes && quantised <= 8 * (codes + codes / 4), "{format:?}: {quantised}");
            assert!(meta.peak() <= quantised + dense, "{format:?}: {} of {quantised}", meta.peak());
            // Nor is it in a step: panels are.
            let tape = Tape::new();
            let x = tape.leaf(&Tensor::zeros(&[1, 2048], DType::BF16, &device)?);
            let before = meta.used();
            let y = layers[0].forward(&x)?;
            tape.backward(&y.sum_all()?)?;
            assert!(meta.peak() - before <= dense, "{format:?}");
        }
        Ok(())
    }

    #[test]
    fn what_dit_starts_at_zero_is_marked_and_starts_so_where_asked() -> Result<()> {
        for on in [false, true] {
            let root = ParamBuilder::new(1, DType::F32, &Device::cpu()).with_adaln_zero(on);
            let normal = Init::Normal { std: 1.0 };
            let (gate, other) =
                (root.sub("gate").zero_init().get("weight", &[3], normal)?, root.get("w", &[3], normal)?);
            assert!(gate.zero_init() && !other.zero_init());
            assert_eq!(gate.value()?.to_vec::<f32>()? == [0.0; 3], on);
            assert!(other.value()?.to_vec::<f32>()? != [0.0; 3]);
        }
        Ok(())
    }
}
