//! How large each parameter's gradient is, on the way to its update.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};

use flowtape_engine::nn::Params;
use flowtape_engine::optim::{SquareSums, StepSink};
use flowtape_engine::{Device, GradientSink, Later, Result, Tensor, VarId};

/// Sums of squares of the gradients of one step's last micro-batch, still on the device.
#[derive(Debug)]
pub(crate) struct GradientSquares {
    sums: SquareSums,
    places: HashMap<VarId, usize>,
    paths: Vec<String>,
    came: RefCell<BTreeSet<usize>>,
}

impl GradientSquares {
    /// For the trained parameters of a model.
    pub fn new(params: &Params, device: &Device) -> Result<Self> {
        let trained: Vec<(VarId, String)> =
            params.iter().filter_map(|param| Some((param.var()?, param.path().to_owned()))).collect();
        let sums = SquareSums::new(trained.len(), device)?;
        let places = trained.iter().enumerate().map(|(place, (var, _))| (*var, place)).collect();
        let paths = trained.into_iter().map(|(_, path)| path).collect();
        Ok(Self { sums, places, paths, came: RefCell::default() })
    }

    /// What came, for later: nothing waits for it yet.
    pub fn read_later(self) -> Result<Squares> {
        Ok(Squares { sums: self.sums.read_later()?, paths: self.paths, came: self.came.into_inner() })
    }
}

/// Sums that are on their way to the host.
pub(crate) struct Squares {
    sums: Later,
    paths: Vec<String>,
    came: BTreeSet<usize>,
}

impl Squares {
    /// By the paths of the parameters that got a gradient. Waits for the device.
    pub fn wait(self) -> Result<Vec<(String, f64)>> {
        let sums = self.sums.wait::<f64>()?;
        let of = |(place, path): (usize, String)| Some((path, *sums.get(place)?));
        Ok(self.paths.into_iter().enumerate().filter(|(place, _)| self.came.contains(place)).filter_map(of).collect())
    }
}

/// Adds gradients to such sums, where there are some, and hands them on.
pub(crate) struct Squared<'a, S> {
    pub sink: S,
    pub squares: Option<&'a GradientSquares>,
}

impl<S: GradientSink> GradientSink for Squared<'_, S> {
    fn gradient(&mut self, var: VarId, gradient: Tensor) -> Result<()> {
        if let Some((squares, place)) = self.squares.and_then(|squares| Some((squares, *squares.places.get(&var)?))) {
            squares.sums.add(place, &gradient)?;
            squares.came.borrow_mut().insert(place);
        }
        self.sink.gradient(var, gradient)
    }
}

impl<S: StepSink> StepSink for Squared<'_, S> {
    fn end(&mut self) -> Result<Option<Tensor>> {
        self.sink.end()
    }
}
