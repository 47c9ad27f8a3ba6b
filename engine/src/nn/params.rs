//! Parameters by path name: how they are made, loaded, saved and checked.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::safetensors::{Shards, save_sharded};
use crate::{DType, Device, Error, Gradients, Philox, Result, Tensor, VarId};

/// How a parameter starts.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Uniform in `[-bound, bound)`.
    Uniform {
        /// The bound.
        bound: f64,
    },
    /// Normal around zero.
    Normal {
        /// The standard deviation.
        std: f64,
    },
}

/// One parameter.
#[derive(Clone, Debug)]
struct Parameter {
    name: String,
    /// What the model computes with.
    tensor: Tensor,
    /// The same in a wider dtype, which `tensor` is rounded from.
    master: Option<Tensor>,
}

impl Parameter {
    /// What is trained and saved.
    fn kept(&self) -> &Tensor {
        self.master.as_ref().unwrap_or(&self.tensor)
    }
}

/// The parameters of a model, in the order in which they were made. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Params(Vec<Parameter>);

impl Params {
    /// Names and tensors.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.0.iter().map(|p| (&p.name[..], &p.tensor))
    }

    /// The wider copy of each parameter, where there is one: what is trained and saved then.
    pub fn masters(&self) -> impl Iterator<Item = Option<&Tensor>> {
        self.0.iter().map(|p| p.master.as_ref())
    }

    /// What is trained and saved: names, and the wider copy of each parameter or else the parameter itself.
    pub fn kept(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.0.iter().map(|p| (&p.name[..], p.kept()))
    }

    /// Overwrites the parameter of that name, and its wider copy.
    ///
    /// # Errors
    /// When there is no such parameter, or `value` has another shape.
    pub fn set(&self, name: &str, value: &Tensor) -> Result<()> {
        let found = self.0.iter().find(|p| p.name == name);
        let p = found.ok_or_else(|| Error::argument("parameter", "the name of a parameter", name))?;
        p.kept().copy_from(value)?;
        p.master.as_ref().map_or(Ok(()), |master| p.tensor.copy_from(master))
    }

    /// The parameter of that name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.iter().find_map(|(n, t)| (n == name).then_some(t))
    }

    /// Number of parameters.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of elements of all parameters.
    pub fn numel(&self) -> usize {
        self.iter().map(|(_, t)| t.numel()).sum()
    }

    /// Overwrites all parameters with a file's tensors of the same names, converted to the parameters' dtypes; the wider
    /// copies too.
    ///
    /// # Errors
    /// When names or shapes differ (one error lists them all; nothing is changed then), or the file can't be read.
    pub fn load(&self, file: &Shards) -> Result<()> {
        self.check_keys(file, |_| false)?;
        self.iter().try_for_each(|(name, tensor)| self.set(name, &file.get(name, tensor.device(), None)?))
    }

    /// Checks that a file has these parameters and no others, but for those that `ignored` names.
    ///
    /// # Errors
    /// One error lists all that is missing, unexpected or of another shape.
    pub fn check_keys(&self, file: &Shards, ignored: impl Fn(&str) -> bool) -> Result<()> {
        let (mut missing, mut mismatched) = (Vec::new(), Vec::new());
        for (name, tensor) in self.iter() {
            match file.dims(name) {
                None => missing.push(name.to_string()),
                Some(dims) if dims != tensor.dims() => {
                    mismatched.push(format!("{name} expected {:?}, got {dims:?}", tensor.dims()));
                }
                Some(_) => {}
            }
        }
        let known: HashSet<&str> = self.iter().map(|(name, _)| name).collect();
        let unexpected = file.names().filter(|n| !known.contains(n) && !ignored(n));
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
    pub fn save(&self, folder: &Path, stem: &str, max_bytes: usize) -> Result<()> {
        // diffusers and transformers read this key.
        let all: Vec<_> = self.kept().map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect();
        save_sharded(folder, stem, &all, &BTreeMap::from([("format".into(), "pt".into())]), max_bytes)
    }

    /// Checks that every parameter has a gradient, but for those named in `allowed`.
    ///
    /// # Errors
    /// Names the parameters without one.
    pub fn check_gradients(&self, gradients: &Gradients, allowed: &[String]) -> Result<()> {
        self.check_reached(|var| gradients.get(var).is_some(), allowed)
    }

    /// Checks that `reached` holds for every parameter, but for those named in `allowed`.
    ///
    /// # Errors
    /// Names the parameters for which it does not.
    pub fn check_reached(&self, reached: impl Fn(VarId) -> bool, allowed: &[String]) -> Result<()> {
        let lacks = |(name, tensor): &(&str, &Tensor)| {
            !tensor.var().is_some_and(&reached) && !allowed.iter().any(|a| a == name)
        };
        let names: Vec<String> = self.iter().filter(lacks).map(|(name, _)| name.into()).collect();
        if names.is_empty() { Ok(()) } else { Err(Error::MissingGradient { names }) }
    }
}

/// Makes parameters under a path. Each draws from a generator of its own, chosen by its name, so that adding one
/// changes no other.
#[derive(Clone, Debug)]
pub struct ParamBuilder {
    path: String,
    random: Philox,
    dtype: DType,
    /// The dtype of wider copies.
    masters: Option<DType>,
    device: Device,
    file: Option<Arc<Shards>>,
    made: Arc<Mutex<Params>>,
}

impl ParamBuilder {
    /// A builder at the root.
    pub fn new(seed: u64, dtype: DType, device: &Device) -> Self {
        let (random, device) = (Philox::new(seed), device.clone());
        Self { path: String::new(), random, dtype, masters: None, device, file: None, made: Arc::default() }
    }

    /// Keeps each parameter in a wider dtype too: that copy is what an optimiser updates and what is saved, and what the
    /// model computes with is rounded from it.
    #[must_use]
    pub fn with_masters(self, dtype: DType) -> Self {
        Self { masters: Some(dtype).filter(|d| *d != self.dtype), ..self }
    }

    /// A builder whose parameters are a file's tensors of their names, converted to `dtype` one by one. What does not fit
    /// gets no memory: check [`Params::check_keys`] before use.
    pub fn from_file(file: Arc<Shards>, dtype: DType, device: &Device) -> Self {
        Self { file: Some(file), ..Self::new(0, dtype, device) }
    }

    /// A builder one step down the path.
    #[must_use]
    pub fn sub(&self, name: impl ToString) -> Self {
        let name = name.to_string();
        let path = if self.path.is_empty() { name } else { format!("{}.{name}", self.path) };
        Self { path, ..self.clone() }
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
    pub fn get(&self, name: &str, dims: &[usize], init: Init) -> Result<Tensor> {
        let path = self.sub(name).path;
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.get(&path).is_some() {
            return Err(Error::argument("parameter", "a new name", path));
        }
        let kept = self.masters.unwrap_or(self.dtype);
        let value = match &self.file {
            Some(file) if file.dims(&path) == Some(dims) => file.get(&path, &self.device, Some(kept)),
            None if self.device.backend().has_data() => self.start(&path, dims, init).and_then(|v| v.to_dtype(kept)),
            None => Tensor::empty(dims, kept, &self.device),
            Some(_) => Tensor::zeros(&[], kept, &self.device).map(|one| one.shape_only(dims)),
        };
        let both = value.and_then(|value| Ok((value.to_dtype(self.dtype)?.with_var(VarId::fresh()), value)));
        let (parameter, value) = both.map_err(|error| match error {
            Error::OutOfMemory { device, bytes, reason } => {
                Error::OutOfMemory { device, bytes, reason: format!("parameter {path}: {reason}") }
            }
            other => other,
        })?;
        let master = self.masters.map(|_| value);
        made.0.push(Parameter { name: path, tensor: parameter.clone(), master });
        Ok(parameter)
    }

    /// Starting values of a parameter.
    fn start(&self, path: &str, dims: &[usize], init: Init) -> Result<Tensor> {
        // FNV-1a: any fixed hash would do.
        let stream =
            path.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let mut random = self.random.fork(stream);
        match init {
            Init::Zeros => Tensor::zeros(dims, self.dtype, &self.device),
            Init::Ones => Tensor::ones(dims, self.dtype, &self.device),
            Init::Uniform { bound } => random.uniform(dims, &self.device)?.mul_scalar(2.0 * bound)?.add_scalar(-bound),
            Init::Normal { std } => random.normal(dims, &self.device)?.mul_scalar(std),
        }
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
        first.save(folder.path(), "p", usize::MAX)?;
        second.load(&open()?)?;
        assert_eq!(second.get("b.0.bias").unwrap().to_vec::<f32>()?, [1.0; 4]);
        let root = ParamBuilder::new(1, DType::F32, &Device::cpu());
        root.sub("a").get("weight", &[3, 2], Init::Ones)?;
        root.get("c", &[1], Init::Ones)?;
        let message = root.params().load(&open()?).unwrap_err().to_string();
        for part in ["missing: [c]", "unexpected: [b.0.bias]", "a.weight expected [3, 2], got [2, 3]"] {
            assert!(message.contains(part), "{message}");
        }
        assert_eq!(root.params().get("c").unwrap().to_vec::<f32>()?, [1.0]);
        Ok(())
    }

    #[test]
    fn a_parameter_without_gradient_is_named() -> Result<()> {
        let params = two()?;
        let tape = Tape::new();
        let loss = tape.attach(params.get("a.weight").unwrap()).square()?.sum_all()?;
        let gradients = tape.backward(&loss)?;
        let error = params.check_gradients(&gradients, &[]).unwrap_err().to_string();
        assert!(error.contains("b.0.bias") && !error.contains("a.weight"), "{error}");
        params.check_gradients(&gradients, &["b.0.bias".into()])
    }
}
